//! The log held against the kernel's own events: nothing claimed that the kernel did not do, nothing done that is not told.

use echoscope::tcp::State;

use crate::support::{Echoscope, quiet_port, try_until};
use crate::trace::{Trace, held_against, paired, told};

#[test]
#[ignore = "needs root and tracefs"]
fn the_log_says_what_the_kernel_did_step_by_step() {
    const LIVES: usize = 200;
    for close in ["graceful", "server-first", "reset"] {
        let port = quiet_port();
        let trace = Trace::start(port..=port);
        let (listen, count) = (format!("127.0.0.1:{port}"), LIVES.to_string());
        let pair =
            Echoscope::start(&["pair", "--listen", &listen, "--connections", "8", "--count", &count, "--close", close]);
        let (status, _, lines) = pair.wait();
        assert_eq!(status.code(), Some(0));
        let told = told(&lines);
        let mut last = Vec::new();
        let done = try_until(|| {
            last = trace.walks();
            let ended = last.iter().filter(|walk| walk.last().to == State::Close).count();
            (ended == told.len()).then(|| last.clone())
        });
        let Some(done) = done else {
            panic!("{close}: told {}, announced {}, lost {}: {last:#?}", told.len(), last.len(), trace.lost());
        };
        // Both ends of each, and the listener.
        assert_eq!((told.len(), trace.lost()), (2 * LIVES + 1, 0), "{close}");
        let mut gaps = Vec::new();
        for pair in paired(told, done) {
            let (Some(told), Some(walk)) = pair else { panic!("{close}: one without the other: {pair:?}") };
            match held_against(&told, &walk) {
                Ok(missed) => gaps.extend(missed),
                Err(fault) => panic!("{close} {:?}: {fault}; told {told}, done {walk}", told.ports),
            }
        }
        // Only our own RST leaves a way open: a FIN could have come in the instant before it.
        let own_resets = if close == "reset" { LIVES } else { 0 };
        assert_eq!(gaps, vec!["ESTABLISHED … CLOSED"; own_resets], "{close}");
    }
}
