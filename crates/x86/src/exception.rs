//! Exceptions: vectors, error codes and classes (SDM 3A 6.3 to 6.15).

/// An exception or fixed interrupt vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "the mnemonics are the architecture's own")]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87Error = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdError = 19,
}

/// How an exception combines with one raised during its delivery (SDM 3A table 6-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Handled one after the other.
    Benign,
    /// Two of these make a double fault.
    Contributory,
    /// A page fault: makes a double fault with itself and with contributory exceptions.
    PageFault,
    /// A double fault: any but a benign exception after it shuts the processor down.
    DoubleFault,
}

impl Vector {
    /// The class that decides whether a second exception makes a double fault.
    pub const fn class(self) -> Class {
        match self {
            Vector::DivideError
            | Vector::InvalidTss
            | Vector::SegmentNotPresent
            | Vector::StackFault
            | Vector::GeneralProtection => Class::Contributory,
            Vector::PageFault => Class::PageFault,
            Vector::DoubleFault => Class::DoubleFault,
            _ => Class::Benign,
        }
    }

    /// Whether the processor pushes an error code.
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Vector::DoubleFault
                | Vector::InvalidTss
                | Vector::SegmentNotPresent
                | Vector::StackFault
                | Vector::GeneralProtection
                | Vector::PageFault
                | Vector::AlignmentCheck
        )
    }

    /// The mnemonic, such as `#GP`.
    pub const fn mnemonic(self) -> &'static str {
        match self {
            Vector::DivideError => "#DE",
            Vector::Debug => "#DB",
            Vector::Nmi => "NMI",
            Vector::Breakpoint => "#BP",
            Vector::Overflow => "#OF",
            Vector::BoundRange => "#BR",
            Vector::InvalidOpcode => "#UD",
            Vector::DeviceNotAvailable => "#NM",
            Vector::DoubleFault => "#DF",
            Vector::InvalidTss => "#TS",
            Vector::SegmentNotPresent => "#NP",
            Vector::StackFault => "#SS",
            Vector::GeneralProtection => "#GP",
            Vector::PageFault => "#PF",
            Vector::X87Error => "#MF",
            Vector::AlignmentCheck => "#AC",
            Vector::MachineCheck => "#MC",
            Vector::SimdError => "#XM",
        }
    }
}

/// An exception to be delivered: its vector and error code.
///
/// Four bytes, so that a `Result<u64, Exception>` travels in registers. The linear address of a page fault
/// is kept beside it, where CR2 will be loaded from on delivery. `error_code` is zero for vectors that push
/// none, but for [`Exception::debug`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which exception.
    pub vector: Vector,
    /// The error code pushed, where [`Vector::has_error_code`].
    pub error_code: u16,
}

impl Exception {
    /// An exception that pushes no error code, or pushes zero.
    pub const fn new(vector: Vector) -> Self {
        Self { vector, error_code: 0 }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: Vector, error_code: u16) -> Self {
        Self { vector, error_code }
    }

    /// `#UD`.
    pub const UD: Self = Self::new(Vector::InvalidOpcode);
    /// `#GP(0)`.
    pub const GP0: Self = Self::new(Vector::GeneralProtection);
    /// `#SS(0)`.
    pub const SS0: Self = Self::new(Vector::StackFault);
    /// `#NM`.
    pub const NM: Self = Self::new(Vector::DeviceNotAvailable);
    /// `#DE`.
    pub const DE: Self = Self::new(Vector::DivideError);
    /// `#AC(0)`.
    pub const AC0: Self = Self::new(Vector::AlignmentCheck);

    /// Debug exception: a breakpoint register was accessed (DR6.BD).
    pub const DEBUG_GENERAL_DETECT: u16 = 1 << 13;
    /// Debug exception: single step (DR6.BS).
    pub const DEBUG_SINGLE_STEP: u16 = 1 << 14;
    /// Debug exception: task switch (DR6.BT).
    pub const DEBUG_TASK_SWITCH: u16 = 1 << 15;

    /// `#DB`. It pushes no error code; `causes` are the bits that DR6 takes on delivery (SDM 3B 18.2.3).
    pub const fn debug(causes: u16) -> Self {
        Self::with_code(Vector::Debug, causes)
    }

    /// `#GP(selector)`.
    pub const fn gp(code: u16) -> Self {
        Self::with_code(Vector::GeneralProtection, code)
    }
}

impl std::fmt::Display for Exception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.vector.has_error_code() {
            write!(f, "{}({:#x})", self.vector.mnemonic(), self.error_code)
        } else {
            f.write_str(self.vector.mnemonic())
        }
    }
}
