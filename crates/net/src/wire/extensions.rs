//! Extension headers of IPv6 (RFC 8200 4): those that say nothing to a NAT are skipped, as every host does.

use super::Packet;

/// Options for each hop on the way (RFC 8200 4.3).
pub(crate) const HOP_OPTIONS: u8 = 0;
/// A way to go (RFC 8200 4.4).
pub(crate) const ROUTING: u8 = 43;
/// Options for the destination (RFC 8200 4.6).
pub(crate) const OPTIONS: u8 = 60;

impl<'a> Packet<'a> {
    /// The packet that pieces of this one have made, with all of its payload.
    pub(crate) fn joined<'b>(&self, payload: &'b [u8]) -> Option<Packet<'b>>
    where
        'a: 'b,
    {
        let mut whole = Packet { payload, fragment: None, ..*self };
        // The extension headers that were cut with the rest.
        if whole.source.is_ipv6() {
            whole.skip_extensions()?;
        }
        Some(whole)
    }

    /// Goes on behind the extension headers that hosts skip. `None` if one of them asks for what is not done here.
    pub(super) fn skip_extensions(&mut self) -> Option<()> {
        loop {
            match self.protocol {
                OPTIONS => self.skip_options()?,
                // One with nowhere left to go is skipped whatever its kind (RFC 8200 4.4).
                ROUTING if *self.payload.get(3)? == 0 => drop(self.take_extension()?),
                ROUTING => return None,
                _ => return Some(()),
            }
        }
    }

    /// Goes on behind a header of options. Each says itself whether who does not know it may skip it (RFC 8200 4.2).
    pub(super) fn skip_options(&mut self) -> Option<()> {
        let mut options = self.take_extension()?.get(2..)?;
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                // The one option without a length, a byte of padding.
                (0, _) => rest,
                (0x01..0x40, [len, rest @ ..]) => rest.get(usize::from(*len)..)?,
                _ => return None,
            };
        }
        Some(())
    }

    /// Takes the extension header at the front of the payload.
    fn take_extension(&mut self) -> Option<&'a [u8]> {
        // In eights of bytes, the first not counted.
        let (header, rest) = self.payload.split_at_checked((usize::from(*self.payload.get(1)?) + 1) * 8)?;
        (self.protocol, self.payload) = (header[0], rest);
        Some(header)
    }
}
