//! Accept queues. Each listening socket has one of its own: where several share a port (SO_REUSEPORT, or an address each), a
//! connection waits in one of them, and finds no place there though others are empty.

use super::row::Row;

/// The accept queue of one listening socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcceptQueue {
    /// Connections that wait for accept(2).
    pub length: u32,
    /// How many may; `None` where that is not told.
    pub limit: Option<u32>,
    /// The socket's inode, by which the process that listens can be found.
    pub inode: u32,
}

impl AcceptQueue {
    /// Of a row in LISTEN.
    #[must_use]
    pub fn of(row: &Row) -> AcceptQueue {
        AcceptQueue { length: row.receive_queue, limit: row.send_queue, inode: row.inode }
    }

    /// Whichever is nearer to dropping handshakes, `self` or `other`: for a port, it is its fullest queue that counts, and a
    /// sum would hide it.
    #[must_use]
    pub fn fuller(self, other: AcceptQueue) -> AcceptQueue {
        // The kernel takes one more than the limit (sk_acceptq_is_full). Where no limit is told, the longer one.
        let places = |queue: AcceptQueue| queue.limit.map_or(1 << 32, |limit| u128::from(limit) + 1);
        let fill = |queue: AcceptQueue, of: AcceptQueue| u128::from(queue.length) * places(of);
        // Equally full: the smaller; and then the older, so that the answer does not depend on the order of rows.
        let rank = |queue, of| (fill(queue, of), std::cmp::Reverse((places(queue), queue.inode)));
        if rank(other, self) > rank(self, other) { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(length: u32, limit: Option<u32>, inode: u32) -> AcceptQueue {
        AcceptQueue { length, limit, inode }
    }

    #[test]
    fn the_fullest_counts_whatever_the_order() {
        let (full, idle, large) = (queue(5, Some(4), 1), queue(0, Some(4096), 2), queue(700, Some(4096), 3));
        for (fuller, other) in [
            (full, idle),
            (full, large),
            (large, idle),
            // Its one place is taken.
            (queue(1, Some(0), 9), queue(4000, Some(4096), 4)),
            // Equally full: the smaller, then the older.
            (queue(0, Some(4), 9), idle),
            (queue(0, Some(4), 5), queue(0, Some(4), 6)),
            // By text no limit is told.
            (queue(3, None, 8), queue(2, None, 7)),
            (queue(u32::MAX, Some(u32::MAX), 1), queue(u32::MAX - 1, Some(u32::MAX), 2)),
        ] {
            assert_eq!((fuller.fuller(other), other.fuller(fuller)), (fuller, fuller), "{fuller:?} and {other:?}");
        }
    }
}
