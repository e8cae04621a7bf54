//! Whole loads, from a kernel made here to guest memory.
