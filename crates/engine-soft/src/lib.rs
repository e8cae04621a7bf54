//! The software engine: soft TLB and reference interpreter.
