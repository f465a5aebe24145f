//! Starting the real binary with less than the tests themselves may do.

use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter};

use crate::support::{Echoscope, command};

/// The command without a single capability, also when the tests run as root.
pub fn command_without_capabilities() -> Command {
    let plain = command();
    let status = std::fs::read_to_string("/proc/self/status").expect("read status");
    if status.lines().any(|line| line.starts_with("CapEff:") && line.ends_with("\t0000000000000000")) {
        return plain;
    }
    let mut confined = Command::new("setpriv");
    confined.env_clear().args(["--bounding-set=-all", "--inh-caps=-all"]);
    confined.arg(plain.get_program()).args(plain.get_args());
    confined
}

/// Starts `command` where a system call gives EPERM, if its arguments are as one of `when` says; without any, always.
pub fn spawn_refusing(command: Command, call: libc::c_long, when: Vec<SeccompRule>) -> Echoscope {
    spawn_failing(command, call, when, libc::EPERM)
}

/// The same with another error. The filter is inherited by what its thread starts, and by nothing else.
pub fn spawn_failing(mut command: Command, call: libc::c_long, when: Vec<SeccompRule>, errno: i32) -> Echoscope {
    std::thread::spawn(move || {
        let filter = SeccompFilter::new(
            [(call, when)].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(errno as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        apply_filter(&program).unwrap();
        Echoscope::spawn(&mut command)
    })
    .join()
    .unwrap()
}
