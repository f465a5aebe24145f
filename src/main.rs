//! echoscope: parse, start the logs, run, exit code.

use std::process::ExitCode;

use echoscope::{app, config::Config, log, metrics};

fn main() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(error) => error.exit(),
    };
    // Before there is a second thread: a namespace of one's own is made by a process with one.
    let prepared = match app::prepare(&config) {
        Ok(prepared) => prepared,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(mistake) => mistake.exit(),
            Err(error) => {
                eprintln!("echoscope: {error:#}");
                return ExitCode::FAILURE;
            }
        },
    };
    let lost = metrics::log_lost_counter();
    let log = match log::init(config.log, std::io::stderr(), lost.clone()) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("echoscope: start the log: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    match app::start(config, prepared, &log, lost) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "cannot go on");
            ExitCode::FAILURE
        }
    }
}
