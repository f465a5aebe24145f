//! One viewer: how far it has come, and what it is told next.

use std::sync::Arc;

use bytes::Bytes;

use super::batch::{self, Place};
use super::{BEHIND, Live, lock};

/// Somebody who looks. It keeps a place in the stream, and nothing of what it was not told yet.
pub struct Viewer {
    live: Arc<Live>,
    /// What it was told last.
    place: Place,
    /// It was told by a process before this one.
    restarted: bool,
    /// It has not caught up yet with what happened while it was away.
    returning: bool,
    /// It does not know how often each way was walked, or not any more.
    owed: bool,
}

impl Viewer {
    /// One that begins at `now`, or where it left, by the id of what it was told last.
    pub(super) fn new(live: Arc<Live>, now: Place, after: Option<&str>) -> Viewer {
        let left = after.and_then(|id| Place::named(id, live.epoch));
        let restarted = after.is_some() && left.is_none();
        // A place ahead of us is nobody's.
        let place = left.filter(|place| place.batch <= now.batch && place.changes <= now.changes);
        Viewer { live, place: place.unwrap_or(now), restarted, returning: true, owed: true }
    }

    /// The next event, as soon as there is one.
    pub async fn next(&mut self) -> Bytes {
        let mut newest = self.live.newest.subscribe();
        loop {
            newest.mark_unchanged();
            if let Some(event) = self.next_now() {
                return event;
            }
            if newest.changed().await.is_err() {
                // The sender lives in what we hold.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The next event, if there is one.
    pub fn next_now(&mut self) -> Option<Bytes> {
        let told = lock(&self.live.told);
        let behind = usize::try_from(told.place.batch.saturating_sub(self.place.batch)).unwrap_or(usize::MAX);
        // Who comes back may have all that is kept; who stays and is slow goes on with the newest.
        let slow = !self.returning && behind > BEHIND;
        let next = match told.batches.len().checked_sub(behind) {
            Some(first) if !slow => told.batches.get(first),
            _ if slow => told.batches.back(),
            _ => told.batches.front(),
        };
        let from = next.map_or(told.place.changes, |batch| batch.before);
        let missed = from.saturating_sub(self.place.changes);
        if missed > 0 {
            self.place = next.map_or(told.place, |batch| Place { batch: batch.place.batch - 1, changes: batch.before });
            if !self.returning {
                self.live.gauges.skipped.inc_by(missed);
            }
            self.owed = true;
            return Some(batch::missed(&self.place.name(self.live.epoch), missed));
        }
        if let Some(batch) = next {
            self.place = batch.place;
            return Some(batch.text.clone());
        }
        if !std::mem::take(&mut self.owed) {
            return None;
        }
        self.returning = false;
        Some(self.live.hello(&told, std::mem::take(&mut self.restarted)))
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        lock(&self.live.told).viewers -= 1;
        self.live.gauges.viewers.dec();
    }
}
