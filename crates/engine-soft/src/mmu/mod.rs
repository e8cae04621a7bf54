//! Address translation: page walks ([`walk`]) and the soft TLB that remembers them ([`tlb`]).

pub mod tlb;
pub mod walk;
