//! Where the lab may play: without a namespace of its own it plays where it is, if it may; otherwise it says what is missing.

use std::process::Command;

use echoscope::kernel::namespace;

use super::{SYSCTLS, assert_shown, sysctl, verdict};
use crate::confined::{command_without_capabilities, spawn_refusing};
use crate::support::{Echoscope, command};

/// Starts `command` where unshare(2) gives EPERM, as a container's seccomp profile has it.
fn without_unshare(command: Command) -> Echoscope {
    spawn_refusing(command, libc::SYS_unshare, vec![])
}

/// Exit 1, nothing on stdout, and one message; returns it.
fn refused(lab: Echoscope) -> String {
    let (status, stdout, lines) = lab.wait();
    assert_eq!((status.code(), stdout.as_str()), (Some(1), ""), "{lines:#?}");
    let [message] = &lines[..] else { panic!("one message: {lines:#?}") };
    let message = message.as_str().expect("a message").to_owned();
    for part in [
        "the lab has no place to play",
        "SO_ATTACH_FILTER: Operation not permitted",
        "CAP_NET_ADMIN",
        "docker run --user 0 --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    message
}

#[test]
fn where_seccomp_refuses_namespaces_it_says_so_and_how_to_get_one() {
    let mut lab = command_without_capabilities();
    lab.args(["--web.listen-address", "127.0.0.1:0", "lab", "half-close"]);
    let message = refused(without_unshare(lab));
    let reason = "a namespace of its own is refused (unshare: Operation not permitted (os error 1)), a container's seccomp \
                  profile or a security module refuses user namespaces";
    assert!(message.contains(reason), "{message}");
}

#[test]
#[ignore = "needs root, and unshare and setpriv (util-linux)"]
fn where_user_namespaces_are_off_it_names_the_sysctl() {
    let plain = command();
    // Within a user namespace it can be switched off without concerning anybody else.
    let switch_off =
        "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all \"$@\"";
    let mut lab = Command::new("unshare");
    lab.env_clear().args(["--user", "--map-root-user", "sh", "-c", switch_off, "sh"]);
    lab.arg(plain.get_program()).args(plain.get_args()).args(["--web.listen-address", "none", "lab", "half-close"]);
    let message = refused(Echoscope::spawn(&mut lab));
    let reason = "user namespaces are off here (user.max_user_namespaces = 0)";
    assert!(message.contains(reason) && message.contains("No space left on device"), "{message}");
}

#[test]
#[ignore = "needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW"]
fn where_it_may_it_plays_in_the_network_that_it_is_in() {
    // A network of this thread's, so that what the lab leaves there is nobody's trouble.
    let (verdict, before, after) = std::thread::spawn(|| {
        namespace::enter_own_network().expect("a network namespace");
        let before = SYSCTLS.map(sysctl);
        let mut lab = command();
        lab.args(["--web.listen-address", "127.0.0.1:0", "lab", "half-close", "syn-recv-stuck"]);
        lab.args(["time-wait-assassination", "--output", "json"]);
        let lab = without_unshare(lab);
        let (status, stdout, lines) = lab.wait();
        assert_eq!(status.code(), Some(0), "{stdout} {lines:#?}");
        (verdict(&stdout), before, SYSCTLS.map(sysctl))
    })
    .join()
    .unwrap();
    assert_shown(&verdict);
    assert_eq!(verdict["ground"], "this network namespace");
    assert_eq!(before, after, "what is not its own it leaves as it is");
}
