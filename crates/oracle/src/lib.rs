//! The host CPU as an oracle, for tests.
//!
//! An engine of this project executes guest code of the host's own instruction set, so the host CPU is the best
//! judge of it. [`Oracle`] runs arbitrary machine code natively, in a throw-away process, from a [`Case`] that
//! states every register, and says in an [`Outcome`] what came of it: registers, flags, vector state, changed
//! memory, or the exception with its error code and address. [`generate`] makes cases by the hundred thousand from
//! the decoder's own table of instruction forms.
//!
//! A machine under test is laid out as [`layout`] says: the same linear addresses, page permissions and
//! descriptors.

mod background;
mod bases;
mod case;
mod child;
pub mod generate;
pub mod layout;
mod oracle;
mod outcome;
mod random;
mod shared;
mod values;
mod xsave;

#[cfg(test)]
mod tests;

pub use background::get as background;
pub use case::{BACKGROUNDS, CODE_MAX, Case, Mode, PATCH_MAX, PATCHES, Patch, Vectors};
pub use oracle::{Oracle, OracleError};
pub use outcome::{Change, End, Outcome};
pub use random::Random;
