//! Tests by raw machine code.

mod events;
