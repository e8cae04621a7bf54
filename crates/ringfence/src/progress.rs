//! Progress of long operations, drawn on a terminal and told in plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringfence_images::Progress;

/// A bar or spinner per step.
pub(crate) struct Bars {
    terminal: bool,
    current: Option<ProgressBar>,
}

/// Steps of known size show how far they are, in bytes.
const SIZED: &str = "{msg:40} {bar:30} {bytes}/{total_bytes} {eta}";
/// Others show that something is going on.
const UNSIZED: &str = "{msg:40} {spinner} {elapsed}";

impl Bars {
    pub(crate) fn new() -> Self {
        Self { terminal: stderr().is_terminal(), current: None }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.current.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bars {
    fn step(&mut self, what: &str, total: Option<u64>) {
        self.finish();
        if !self.terminal {
            eprintln!("{what}");
            return;
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let template = if total.is_some() { SIZED } else { UNSIZED };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.current = Some(bar);
    }

    fn advance(&mut self, done: u64) {
        if let Some(bar) = &self.current {
            bar.set_position(done);
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.finish();
    }
}
