//! One echo: payload out and back, compared byte for byte while it flows, so that a message of any size needs the
//! same memory.

use std::io::{ErrorKind, Result};

use crate::conn::Conn;

/// What is made, or read, at a time.
const CHUNK: usize = 64 * 1024;

/// How an echo failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum EchoError {
    #[error("byte {at} came back different")]
    Mismatch { at: u64 },
    #[error("the peer ended its stream after {received} of {size} bytes")]
    Short { received: u64, size: u64 },
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// The two halves' buffers, used again for every message of a connection.
#[derive(Default)]
pub(super) struct Buffers {
    out: Vec<u8>,
    back: Vec<u8>,
    expected: Vec<u8>,
}

/// A payload of `size` bytes that no other message shares, made as needed, twice: to send and to compare.
struct Payload {
    random: fastrand::Rng,
    left: u64,
}

impl Payload {
    fn new(seed: u64, size: u64) -> Payload {
        Payload { random: fastrand::Rng::with_seed(seed), left: size }
    }

    /// The next chunk; always cut at the same places, so that both halves draw the same bytes.
    fn next(&mut self, chunk: &mut Vec<u8>) {
        let len = self.left.min(CHUNK as u64) as usize;
        chunk.resize(len, 0);
        self.random.fill(chunk);
        self.left -= len as u64;
    }
}

/// Sends `size` bytes drawn from `seed` and reads them back.
pub(super) async fn echo(
    conn: &mut Conn,
    seed: u64,
    size: u64,
    buffers: &mut Buffers,
) -> std::result::Result<(), EchoError> {
    let Buffers { out, back, expected } = buffers;
    let (mut sending, mut comparing) = (Payload::new(seed, size), Payload::new(seed, size));
    let (mut written, mut matched, mut received) = (0, 0, 0);
    sending.next(out);
    expected.clear();
    loop {
        while written < out.len() {
            match nothing_yet(conn.try_write(&out[written..]))? {
                Some(n) => written += n,
                None => break,
            }
            if written == out.len() && sending.left > 0 {
                sending.next(out);
                written = 0;
            }
        }
        // Never more than is due: what comes beyond it belongs to nobody and shows at the close.
        back.resize((size - received).min(CHUNK as u64) as usize, 0);
        match nothing_yet(conn.try_read(back))? {
            Some(0) => return Err(EchoError::Short { received, size }),
            Some(n) => {
                let mut rest = &back[..n];
                while !rest.is_empty() {
                    if matched == expected.len() {
                        comparing.next(expected);
                        matched = 0;
                    }
                    let len = rest.len().min(expected.len() - matched);
                    if rest[..len] != expected[matched..matched + len] {
                        let same = rest[..len].iter().zip(&expected[matched..]).take_while(|(a, b)| a == b).count();
                        return Err(EchoError::Mismatch { at: received + same as u64 });
                    }
                    matched += len;
                    received += len as u64;
                    rest = &rest[len..];
                }
                if received == size {
                    return Ok(());
                }
                // A fast peer must not keep the timeout from being noticed.
                tokio::task::coop::consume_budget().await;
            }
            None if written < out.len() => conn.writable_or_readable().await?,
            None => conn.readable().await?,
        }
    }
}

fn nothing_yet(result: Result<usize>) -> Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_draw_the_same_bytes_and_no_two_messages_do() {
        let whole = |seed, size| {
            let (mut payload, mut bytes, mut chunk) = (Payload::new(seed, size), Vec::new(), Vec::new());
            while payload.left > 0 {
                payload.next(&mut chunk);
                bytes.extend_from_slice(&chunk);
            }
            bytes
        };
        assert_eq!(whole(7, 200_000), whole(7, 200_000));
        assert_eq!(whole(7, 200_000).len(), 200_000);
        assert_ne!(whole(7, 64), whole(8, 64));
    }
}
