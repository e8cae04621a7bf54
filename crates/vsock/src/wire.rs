//! Packets as bytes: `struct virtio_vsock_hdr` (5.10.6) with data behind it; and the messages of the link that are none.

/// Bytes of a packet's header.
pub const HEADER: usize = 44;
/// Data in one packet at most, on the link: all that a connection may have on its way.
pub const MAX_DATA: usize = crate::connection::BUFFER as usize;
/// The longest message on the link.
pub const MAX_MESSAGE: usize = HEADER + MAX_DATA;
/// The host's number.
pub const HOST: u64 = 2;
/// Messages of one byte: the driver has begun anew, or is gone. All connections end.
pub const ACTIVE: u8 = 1;
/// The same for a driver that is gone.
pub const INACTIVE: u8 = 0;
/// Where in a header the length of the data is.
pub const LEN: usize = 24;

/// The only type of socket here (`VIRTIO_VSOCK_TYPE_STREAM`).
pub(crate) const STREAM: u16 = 1;

/// What a packet is for (`VIRTIO_VSOCK_OP_…`).
pub(crate) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: the sender will receive, or send, no more.
pub(crate) const NO_RECEIVE: u32 = 1;
pub(crate) const NO_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) from_cid: u64,
    pub(crate) to_cid: u64,
    pub(crate) from_port: u32,
    pub(crate) to_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) room: u32,
    pub(crate) taken: u32,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (bytes, data) = bytes.split_first_chunk::<HEADER>()?;
        let part = |at: usize, len: usize| {
            let bytes = bytes.iter().skip(at).take(len);
            bytes.rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let header = Self {
            from_cid: part(0, 8),
            to_cid: part(8, 8),
            from_port: part(16, 4) as u32,
            to_port: part(20, 4) as u32,
            len: part(LEN, 4) as u32,
            kind: part(28, 2) as u16,
            op: part(30, 2) as u16,
            flags: part(32, 4) as u32,
            room: part(36, 4) as u32,
            taken: part(40, 4) as u32,
        };
        Some((header, data))
    }

    pub(crate) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, value: &[u8]| {
            bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
        };
        put(0, &self.from_cid.to_le_bytes());
        put(8, &self.to_cid.to_le_bytes());
        put(16, &self.from_port.to_le_bytes());
        put(20, &self.to_port.to_le_bytes());
        put(LEN, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.room.to_le_bytes());
        put(40, &self.taken.to_le_bytes());
        bytes
    }

    /// The answer to a packet that belongs to no connection.
    pub(crate) fn reset(&self) -> Self {
        Self {
            from_cid: self.to_cid,
            to_cid: self.from_cid,
            from_port: self.to_port,
            to_port: self.from_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}
