//! Address translation: page walks ([`walk`]) the soft TLB that remembers them ([`tlb`]), and which
//! pages are written to ([`track`]).

pub mod tlb;
pub mod track;
pub mod walk;
