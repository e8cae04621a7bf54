//! What became of a case.

use crate::case::Vectors;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The processor raised an exception. A case that runs off its code ends with one too: a breakpoint (vector
    /// 3) in the INT3 bytes around it.
    Exception {
        /// Vector number.
        vector: u8,
        /// Error code, 0 where the vector has none.
        error: u32,
        /// CR2, for page faults.
        address: u64,
    },
    /// It tried to make a system call.
    SystemCall,
    /// It did not end within the time allowed.
    Hung,
    /// The process died of it.
    Lost,
}

/// Bytes that the case changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// First byte, as an offset in the concatenated data pages.
    pub offset: usize,
    /// What the memory holds now, from the first to the last byte that differs (rounded to 8).
    pub bytes: Vec<u8>,
}

/// The state after a case. Meaningless but for `end` when it was lost.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// General-purpose registers, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer within the code segment; after the INT3 for a breakpoint.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [u16; 6],
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Vector, opmask and x87 registers; a component that the host lacks reads as 0.
    pub vectors: Vectors,
    /// What it wrote, if it wrote.
    pub memory: Option<Change>,
}

impl Outcome {
    /// Whether the code ran to its end or branched away, rather than faulting: it ended on a filler INT3 or on the
    /// single-step trap.
    pub fn completed(&self) -> bool {
        matches!(self.end, End::Exception { vector: 1 | 3, .. })
    }
}
