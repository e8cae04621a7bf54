//! Where a guest's instructions are: what an engine can find out while it runs.

/// Where the guest was when it had executed another [`GuestProfile::period`] instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// RIP: in translated code the start of a block, or of a part of one.
    pub rip: u64,
    /// The guest was at CPL 3.
    pub user: bool,
    /// The guest physical address of the page that RIP is in; `None` if it could not be told without walking page tables.
    pub page: Option<u64>,
}

/// Samples by count of instructions, and what translated code left to interpreter handlers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestProfile {
    /// Instructions between two samples.
    pub period: u64,
    /// Instructions executed in all.
    pub instructions: u64,
    /// Places and how many samples were taken there, in no order.
    pub samples: Vec<(Place, u64)>,
    /// Samples at places for which there was no room.
    pub elsewhere: u64,
    /// Instructions that translated code handed to handlers: the decoder's name of the form, and how often; in no order.
    pub handed: Vec<(String, u64)>,
}
