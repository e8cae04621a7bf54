//! Both ends of a serial port on the host: where the guest's output goes and where its input comes from.

mod input;
mod marks;
mod output;

pub use input::{ConsoleInput, Escape, InputEvent, pump};
pub use marks::Marks;
pub use output::{ConsoleOutput, Nowhere};
