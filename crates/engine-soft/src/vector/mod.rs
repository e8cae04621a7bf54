//! x87, MMX, SSE and AVX, up to AVX-512.
//!
//! These instructions run on the host CPU, since it is the definition of what they compute. Each is re-encoded
//! with its operands in fixed registers ([`encode`]) between loads and stores of the guest's registers
//! ([`state`]); memory operands go through a bounce buffer, so no guest address is ever given to the host and
//! no host address shows in the guest's x87 pointers. Only what the table ([`table`]) lists is run; alignment,
//! masks, gathers and the layouts of FXSAVE, XSAVE and FNSTENV are Rust.
//!
//! The interpreter prepares an instruction once ([`Preparer::prepare`]), when it decodes a block, and then
//! copies operands in, calls [`VectorUnit::run`], and copies results out.

mod arena;
mod call;
mod direct;
mod elements;
mod encode;
mod environment;
mod features;
mod floating;
mod form;
pub(crate) mod gather;
mod moves;
pub mod ops;
pub(crate) mod pass;
mod special;
mod state;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod xsave;

pub use arena::{Arena, ArenaError};
pub use elements::{Elements, Mask};
pub use environment::Layout;
pub use features::FeatureSet;
pub use form::{Denial, Enabled, Execution, Form, Location, Memory, Outcome, Preparer, Refusal, Requirement};
pub use state::{MXCSR_DEFAULT, Pointers, Quirks, Slots, VectorUnit};
pub use store::Vector;
pub use table::Special;
pub use xsave::{InvalidImage, Save, Saved, View, XsaveLayout};
