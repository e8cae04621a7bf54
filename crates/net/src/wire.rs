//! Frames as bytes: what the stack reads from them, and how it makes them.
//!
//! Reading never trusts a length: everything is got by checked slices, and what does not fit is no packet. Lengths of IP
//! headers bound what is behind them; trailing bytes (Ethernet's padding) are cut.

pub(crate) mod extensions;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use extensions::HOP_OPTIONS;

/// The header before each frame on the link: `struct virtio_net_hdr_v1` (virtio 1.2 5.1.6), little endian.
pub const VNET: usize = 12;
/// The longest frame with its header: an IP packet of 64 KiB in Ethernet.
pub const MAX_MESSAGE: usize = VNET + ETH + 65_535;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
pub const DATA_VALID: u8 = 2;
/// First byte of a message that is no frame but [`Offloads`] in its second.
pub const CONTROL: u8 = 0xff;

const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
pub(crate) const ETH: usize = 14;

/// What the guest's driver takes in frames it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are not finished (`VIRTIO_NET_F_GUEST_CSUM`).
    pub checksum: bool,
    /// TCP segments over IPv4 longer than a frame (`VIRTIO_NET_F_GUEST_TSO4`).
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}

impl Offloads {
    /// The message that tells the other end.
    pub fn message(self) -> [u8; 2] {
        [CONTROL, u8::from(self.checksum) | u8::from(self.tso4) << 1 | u8::from(self.tso6) << 2]
    }

    pub(crate) fn from_bits(bits: u8) -> Self {
        let checksum = bits & 1 != 0;
        Self { checksum, tso4: checksum && bits & 2 != 0, tso6: checksum && bits & 4 != 0 }
    }
}

/// Six bytes of an Ethernet address.
pub type Mac = [u8; 6];

pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP6: u8 = 58;
/// The extension header of a piece of an IPv6 packet (RFC 8200 4.5).
pub(crate) const FRAGMENT: u8 = 44;

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The ones' complement sum of `bytes` on top of `sum` (RFC 1071). Byte order cancels out, so words are summed as the
/// host reads them and swapped at the end.
pub(crate) fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut total = u64::from(start);
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        let word = u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        total += u64::from(word);
    }
    let mut rest = [0; 4];
    rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    total += u64::from(u32::from_be_bytes(rest));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u32
}

/// The sum over the pseudo header of TCP, UDP and ICMPv6 (RFC 9293 3.1, RFC 8200 8.1).
pub(crate) fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> u32 {
    let part = match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => sum(&s.octets(), sum(&d.octets(), 0)),
        (IpAddr::V6(s), IpAddr::V6(d)) => sum(&s.octets(), sum(&d.octets(), 0)),
        _ => 0,
    };
    sum(&(len as u32).to_be_bytes(), part + u32::from(protocol))
}

/// Which piece of a packet it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// The packet's number.
    pub(crate) id: u32,
    /// Where in its payload the piece belongs.
    pub(crate) offset: usize,
    /// There is something behind it.
    pub(crate) more: bool,
}

/// An IP packet: where from, where to, and what it carries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) payload: &'a [u8],
    pub(crate) hops: u8,
    /// If it is only a piece; the payload is that piece's.
    pub(crate) fragment: Option<Fragment>,
}

impl<'a> Packet<'a> {
    /// Reads the packet behind an Ethernet header, and behind the extension headers of IPv6.
    pub(crate) fn read(ethertype: u16, bytes: &'a [u8]) -> Option<Self> {
        match ethertype {
            IPV4 => {
                let first = *bytes.first()?;
                let header = usize::from(first & 15) * 4;
                let total = usize::from(be16(bytes, 2)?);
                let head = bytes.get(..header)?;
                let (id, place) = (be16(bytes, 4)?.into(), be16(bytes, 6)?);
                let fragment =
                    Fragment { id, offset: usize::from(place & 0x1fff) * 8, more: place & 0x2000 != 0 };
                if first >> 4 != 4 || header < 20 || sum(head, 0) != 0xffff {
                    return None;
                }
                let octets = |at: usize| Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into());
                Some(Self {
                    source: octets(12)?,
                    destination: octets(16)?,
                    protocol: bytes[9],
                    payload: bytes.get(header..total)?,
                    hops: bytes[8],
                    fragment: (place & 0x3fff != 0).then_some(fragment),
                })
            }
            IPV6 => {
                let len = usize::from(be16(bytes, 4)?);
                let octets = |at: usize| Some(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into());
                (bytes.first()? >> 4 == 6).then_some(())?;
                let mut packet = Self {
                    source: octets(8)?,
                    destination: octets(24)?,
                    protocol: bytes[6],
                    payload: bytes.get(40..40 + len)?,
                    hops: bytes[7],
                    fragment: None,
                };
                // Options for each hop come first or not at all (RFC 8200 4.1).
                if packet.protocol == HOP_OPTIONS {
                    packet.skip_options()?;
                }
                packet.skip_extensions()?;
                if packet.protocol == FRAGMENT {
                    let place = be16(packet.payload, 2)?;
                    let fragment = Fragment {
                        id: be32(packet.payload, 4)?,
                        offset: usize::from(place & !7),
                        more: place & 1 != 0,
                    };
                    packet.protocol = packet.payload[0];
                    packet.payload = packet.payload.get(8..)?;
                    // A whole packet with such a header is a packet (RFC 6946).
                    packet.fragment = (place & !6 != 0).then_some(fragment);
                    if packet.fragment.is_none() {
                        packet.skip_extensions()?;
                    }
                }
                Some(packet)
            }
            _ => None,
        }
    }

    /// Whether the checksum over the payload, pseudo header included, is right.
    pub(crate) fn sum_is_right(&self) -> bool {
        let pseudo = pseudo(self.source, self.destination, self.protocol, self.payload.len());
        sum(self.payload, pseudo) == 0xffff
    }
}

/// Puts a [`VNET`], an Ethernet and an IP header for `len` bytes of `protocol` into `out`, which it empties.
pub(crate) fn headers(
    out: &mut Vec<u8>,
    [to, from]: [Mac; 2],
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    len: usize,
) {
    out.clear();
    out.extend_from_slice(&[0; VNET]);
    out[10] = 1; // num_buffers, which the device sets again
    out.extend_from_slice(&to);
    out.extend_from_slice(&from);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => ipv4(out, source, destination, protocol, len),
        (IpAddr::V6(source), IpAddr::V6(destination)) => ipv6(out, source, destination, protocol, len),
        _ => {}
    }
}

fn ipv4(out: &mut Vec<u8>, source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) {
    out.extend_from_slice(&IPV4.to_be_bytes());
    let at = out.len();
    out.extend_from_slice(&[0x45, 0]);
    out.extend_from_slice(&((20 + len) as u16).to_be_bytes());
    out.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
    out.extend_from_slice(&source.octets());
    out.extend_from_slice(&destination.octets());
    let check = !(sum(&out[at..], 0) as u16);
    out[at + 10..at + 12].copy_from_slice(&check.to_be_bytes());
}

fn ipv6(out: &mut Vec<u8>, source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, len: usize) {
    out.extend_from_slice(&IPV6.to_be_bytes());
    out.extend_from_slice(&[0x60, 0, 0, 0]);
    out.extend_from_slice(&(len as u16).to_be_bytes());
    // Neighbour discovery demands 255 (RFC 4861 7.1); nothing else minds.
    out.extend_from_slice(&[protocol, 255]);
    out.extend_from_slice(&source.octets());
    out.extend_from_slice(&destination.octets());
}

/// What TCP's fields are, in host order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) scale: Option<u8>,
    pub(crate) payload: &'a [u8],
}

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

impl<'a> Segment<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Option<Self> {
        let offset = usize::from(*bytes.get(12)? >> 4) * 4;
        let options = bytes.get(20..offset)?;
        let mut segment = Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            seq: be32(bytes, 4)?,
            ack: be32(bytes, 8)?,
            flags: bytes[13],
            window: be16(bytes, 14)?,
            payload: bytes.get(offset..)?,
            ..Self::default()
        };
        segment.options(options);
        Some(segment)
    }

    fn options(&mut self, mut bytes: &[u8]) {
        while let [kind, rest @ ..] = bytes {
            match kind {
                0 => return,
                1 => bytes = rest,
                _ => {
                    let len = usize::from(rest.first().copied().unwrap_or(0));
                    let Some(value) = bytes.get(2..len) else { return };
                    match (kind, value) {
                        (2, [a, b]) => self.mss = Some(u16::from_be_bytes([*a, *b])),
                        (3, [shift]) => self.scale = Some((*shift).min(14)),
                        _ => {}
                    }
                    bytes = &bytes[len..];
                }
            }
        }
    }

    /// The bytes of its header; options are there with SYN only.
    pub(crate) fn header_len(&self) -> usize {
        20 + if self.mss.is_some() { 4 } else { 0 } + if self.scale.is_some() { 4 } else { 0 }
    }

    /// Puts the headers before `body` into `out`. A `body` longer than `mss` becomes a GSO frame. The checksum is left
    /// to the guest where it takes that.
    pub(crate) fn write(
        &self,
        out: &mut Vec<u8>,
        macs: [Mac; 2],
        ips: [IpAddr; 2],
        body: [&[u8]; 2],
        mss: usize,
        offloads: Offloads,
    ) {
        let body_len = body[0].len() + body[1].len();
        let len = self.header_len() + body_len;
        headers(out, macs, ips[0], ips[1], TCP, len);
        let at = out.len();
        out.extend_from_slice(&self.source.to_be_bytes());
        out.extend_from_slice(&self.destination.to_be_bytes());
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(&self.ack.to_be_bytes());
        out.extend_from_slice(&[(self.header_len() as u8 / 4) << 4, self.flags]);
        out.extend_from_slice(&self.window.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        if let Some(mss) = self.mss {
            out.extend_from_slice(&[2, 4]);
            out.extend_from_slice(&mss.to_be_bytes());
        }
        if let Some(scale) = self.scale {
            out.extend_from_slice(&[1, 3, 3, scale]);
        }
        let pseudo = pseudo(ips[0], ips[1], TCP, len);
        let check = if offloads.checksum {
            out[0] = NEEDS_CSUM;
            out[6..8].copy_from_slice(&((at - VNET) as u16).to_le_bytes());
            out[8..10].copy_from_slice(&16_u16.to_le_bytes());
            pseudo as u16
        } else {
            let mut all = out[at..].to_vec();
            all.extend_from_slice(body[0]);
            all.extend_from_slice(body[1]);
            !(sum(&all, pseudo) as u16)
        };
        out[at + 16..at + 18].copy_from_slice(&check.to_be_bytes());
        if body_len > mss {
            out[1] = if ips[0].is_ipv4() { GSO_TCP4 } else { GSO_TCP6 };
            let headers = (out.len() - VNET) as u16;
            out[2..4].copy_from_slice(&headers.to_le_bytes());
            out[4..6].copy_from_slice(&(mss as u16).to_le_bytes());
        }
    }
}

/// The most bytes that a datagram carries.
pub(crate) fn longest_datagram(ip: IpAddr) -> usize {
    65_535 - if ip.is_ipv4() { 20 + 8 } else { 8 }
}

/// A UDP datagram in a frame.
pub(crate) fn udp(out: &mut Vec<u8>, macs: [Mac; 2], ips: [IpAddr; 2], ports: [u16; 2], body: &[u8]) {
    let len = 8 + body.len();
    headers(out, macs, ips[0], ips[1], UDP, len);
    let at = out.len();
    out.extend_from_slice(&ports[0].to_be_bytes());
    out.extend_from_slice(&ports[1].to_be_bytes());
    out.extend_from_slice(&(len as u16).to_be_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(body);
    let check = !(sum(&out[at..], pseudo(ips[0], ips[1], UDP, len)) as u16);
    // Zero would mean that there is none (RFC 768).
    let check = if check == 0 { 0xffff } else { check };
    out[at + 6..at + 8].copy_from_slice(&check.to_be_bytes());
}

/// An ICMP or ICMPv6 message in a frame; `message` comes with a zero checksum.
pub(crate) fn icmp(out: &mut Vec<u8>, macs: [Mac; 2], ips: [IpAddr; 2], message: &[u8]) {
    let (protocol, pseudo) = match ips[0] {
        IpAddr::V4(_) => (ICMP, 0),
        IpAddr::V6(_) => (ICMP6, pseudo(ips[0], ips[1], ICMP6, message.len())),
    };
    headers(out, macs, ips[0], ips[1], protocol, message.len());
    let at = out.len();
    out.extend_from_slice(message);
    let check = !(sum(message, pseudo) as u16);
    out[at + 2..at + 4].copy_from_slice(&check.to_be_bytes());
}
