//! The host CPU as an oracle: runs code natively in a throw-away process.
