//! Where a console's input comes from.

use super::Serial;

/// The receiving side of a console, whichever device it is.
pub trait SerialInput: Send + Sync {
    /// Hands bytes from the front of `bytes` to the guest and returns how many it took. Never blocks.
    fn input(&self, bytes: &[u8]) -> usize;
    /// Registers what to call when there is room again after [`input`] took less than all. It must not block. The first
    /// registration holds.
    ///
    /// [`input`]: SerialInput::input
    fn on_input_room(&self, wake: Box<dyn Fn() + Send + Sync>);
    /// The terminal has another size, in characters. Means something only to devices that can tell the guest.
    fn resize(&self, columns: u16, rows: u16) {
        let _ = (columns, rows);
    }
}

impl SerialInput for Serial {
    fn input(&self, bytes: &[u8]) -> usize {
        Self::input(self, bytes)
    }

    fn on_input_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        Self::on_input_room(self, wake);
    }
}
