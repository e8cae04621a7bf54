//! How a long operation tells its caller what it is doing.

/// Receives the steps of an operation, for instance to draw a bar for each.
pub trait Progress {
    /// A new step begins; the one before is done. `total` is its size in bytes where that is known.
    fn step(&mut self, what: &str, total: Option<u64>);

    /// `done` bytes of the current step are finished. Never shrinks within a step.
    fn advance(&mut self, done: u64);
}

/// Takes no notice of anything.
#[derive(Debug, Default, Clone, Copy)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&mut self, _what: &str, _total: Option<u64>) {}

    fn advance(&mut self, _done: u64) {}
}
