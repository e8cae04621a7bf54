//! Interrupt messages: what travels between local APICs, the I/O APIC and devices.

/// What an interrupt message does at its target (SDM 3A 10.6.1, 10.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryMode {
    /// The vector, at every target.
    Fixed,
    /// The vector, at the one target with the lowest priority.
    LowestPriority,
    /// System management interrupt; there is no system management mode here.
    Smi,
    /// A reserved encoding.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI with a page number as vector. Only between local APICs.
    StartUp,
    /// The vector comes from the 8259 pair.
    ExtInt,
}

impl DeliveryMode {
    /// The mode in bits 10:8 of an ICR, LVT entry, redirection entry or MSI data word.
    pub(crate) const fn from_register(low: u32) -> Self {
        match (low >> 8) & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// The local APIC with this id.
    Physical(u32),
    /// Those whose logical destination register matches.
    Logical(u32),
    /// All.
    Broadcast,
    /// All but the one with this id.
    AllBut(u32),
}

impl Destination {
    /// A destination of 8 bits: I/O APIC, MSI, xAPIC ICR. All ones means everybody (SDM 3A 10.6.2).
    pub(crate) const fn narrow(id: u8, logical: bool) -> Self {
        match (id, logical) {
            (0xff, _) => Self::Broadcast,
            (id, true) => Self::Logical(id as u32),
            (id, false) => Self::Physical(id as u32),
        }
    }

    /// A destination of 32 bits: x2APIC ICR (SDM 3A 10.12.9).
    pub(crate) const fn wide(id: u32, logical: bool) -> Self {
        match (id, logical) {
            (u32::MAX, _) => Self::Broadcast,
            (id, true) => Self::Logical(id),
            (id, false) => Self::Physical(id),
        }
    }
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) destination: Destination,
    pub(crate) mode: DeliveryMode,
    pub(crate) vector: u8,
    /// Level-triggered: the end of interrupt is told to the I/O APIC.
    pub(crate) level: bool,
}

impl Message {
    /// Decodes a message-signalled interrupt (SDM 3A 10.11). `None` if the address is not one of those that
    /// interrupts are written to, or if it only takes back a level.
    pub(crate) fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let redirection_hint = address & 8 != 0;
        let logical = address & 4 != 0;
        let level = data & 0x8000 != 0;
        if level && data & 0x4000 == 0 {
            return None;
        }
        let mode = match DeliveryMode::from_register(data) {
            DeliveryMode::Fixed if redirection_hint => DeliveryMode::LowestPriority,
            // Start-up is only for IPIs (table 10-3).
            DeliveryMode::StartUp => DeliveryMode::Reserved,
            mode => mode,
        };
        let destination = Destination::narrow((address >> 12) as u8, logical);
        Some(Self { destination, mode, vector: data as u8, level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields_are_decoded() {
        let fixed = Message::from_msi(0xfee0_3000, 0x0041).unwrap();
        let expected = Message {
            destination: Destination::Physical(3),
            mode: DeliveryMode::Fixed,
            vector: 0x41,
            level: false,
        };
        assert_eq!(fixed, expected);
        let lowest = Message::from_msi(0xfee0_500c, 0x0141).unwrap();
        assert_eq!(lowest.destination, Destination::Logical(5));
        assert_eq!(lowest.mode, DeliveryMode::LowestPriority);
        let level = Message::from_msi(0xfeef_f000, 0xc041).unwrap();
        assert_eq!((level.destination, level.level), (Destination::Broadcast, true));
        let nmi = Message::from_msi(0xfee0_0000, 0x0400).unwrap();
        assert_eq!(nmi.mode, DeliveryMode::Nmi);
    }

    #[test]
    fn msi_redirection_hint_makes_fixed_lowest_priority() {
        let message = Message::from_msi(0xfee0_3008, 0x0041).unwrap();
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        assert_eq!(message.destination, Destination::Physical(3));
    }

    #[test]
    fn msi_outside_the_window_or_taking_back_a_level_is_nothing() {
        assert_eq!(Message::from_msi(0xfed0_0000, 0x41), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0x41), None);
        assert_eq!(Message::from_msi(0xfee0_0000, 0x8041), None);
    }
}
