//! Exit statuses, and how an error is told.

use std::error::Error;
use std::fmt::Write as _;

/// The guest switched itself off.
pub(crate) const SUCCESS: u8 = 0;
/// Wrong usage; clap uses the same.
pub(crate) const USAGE: u8 = 2;
/// `--timeout` ran out, as `timeout(1)` has it.
pub(crate) const TIMEOUT: u8 = 124;
/// A failure of ours or of the guest.
pub(crate) const FAILURE: u8 = 125;
/// Added to a signal's number, as shells have it.
pub(crate) const SIGNAL: u8 = 128;

/// Why the command ends without success.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit status.
    pub(crate) status: u8,
    error: Box<dyn Error + Send + Sync>,
}

impl Failure {
    /// The user asked for something that cannot be had.
    pub(crate) fn usage(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { status: USAGE, error: error.into() }
    }

    /// Something went wrong.
    pub(crate) fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { status: FAILURE, error: error.into() }
    }

    /// The error and its causes, one line each. A cause that the line above quotes already is left out.
    pub(crate) fn chain(&self) -> String {
        let mut text = format!("error: {}", self.error);
        let mut said = self.error.to_string();
        let mut next = self.error.source();
        while let Some(cause) = next {
            let message = cause.to_string();
            if !said.contains(&message) {
                // Writing to a string cannot fail.
                let _ = write!(text, "\n  caused by: {message}");
                said = message;
            }
            next = cause.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Step {
        text: &'static str,
        source: Option<Box<Step>>,
    }

    #[test]
    fn chain_names_each_cause_once() {
        let inner = Step { text: "no such file", source: None };
        let middle = Step { text: "cannot open k: no such file", source: Some(Box::new(inner)) };
        let outer = Step { text: "cannot boot", source: Some(Box::new(middle)) };
        let failure = Failure::failed(outer);
        assert_eq!(failure.chain(), "error: cannot boot\n  caused by: cannot open k: no such file");
        assert_eq!(failure.status, 125);
    }
}
