//! The `ringfence` command.

#![forbid(unsafe_code)]

mod args;
mod command_status;
mod console;
mod doctor;
mod exit;
mod image;
mod profile;
mod progress;
mod report;
mod run;
mod signals;
mod table;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use ringfence_machine::{net_helper_main, share_helper_main, vsock_helper_main};

use crate::args::{Arguments, Command};

fn main() -> ExitCode {
    restore_terminal_before_panics();
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Image(command) => image::image(&command),
        Command::NetHelper { spec } => return ExitCode::from(net_helper_main(&spec)),
        Command::VsockHelper { spec } => return ExitCode::from(vsock_helper_main(&spec)),
        Command::ShareHelper { spec } => {
            // A limit on the size of files is an error for the guest, and not the end of the process.
            return match signals::survive_size_limit() {
                Ok(()) => ExitCode::from(share_helper_main(&spec)),
                Err(_) => ExitCode::FAILURE,
            };
        }
        Command::Doctor(listing) => doctor::doctor(listing),
    };
    let status = result.unwrap_or_else(|failure| {
        terminal::tell(&failure.chain());
        failure.status
    });
    ExitCode::from(status)
}

/// A panic's message would be unreadable in raw mode, and the terminal must not stay in it.
fn restore_terminal_before_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        usual(panic);
    }));
}
