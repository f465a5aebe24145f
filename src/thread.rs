//! Threads with an event loop of their own.
//!
//! Must not know: what runs on them.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread;

use tokio::runtime::Builder;

/// Runs on a thread called `name`, on an event loop of its own, what `work` makes there. Returns as soon as it is to run.
///
/// The loop is made there, too: whoever starts this is in an event loop himself, where none may be dropped.
///
/// # Errors
/// When the thread cannot be started, or its event loop cannot be made.
pub fn with_event_loop<F>(name: &str, work: impl FnOnce() -> F + Send + 'static) -> io::Result<()>
where
    F: Future<Output = ()>,
{
    let (made, is_made) = sync_channel(1);
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        match Builder::new_current_thread().enable_io().enable_time().build() {
            Ok(runtime) => {
                // Whoever started this waits for it.
                let _ = made.send(Ok(()));
                runtime.block_on(work());
            }
            Err(error) => drop(made.send(Err(error))),
        }
    })?;
    is_made.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_made_there_runs_there() {
        let (said, told) = tokio::sync::oneshot::channel();
        let work = move || async move {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            let _ = said.send(thread::current().name().map(str::to_owned));
        };
        with_event_loop("apart", work).unwrap();
        assert_eq!(told.await.unwrap().as_deref(), Some("apart"));
    }
}
