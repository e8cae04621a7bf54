//! A queue of bytes of bounded size that takes memory as it needs it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};

/// The first allocation.
const SMALLEST: usize = 16 << 10;

/// Bytes in order; the capacity is a power of two.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    bytes: Vec<u8>,
    head: usize,
    len: usize,
}

impl Ring {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// `len` bytes from `skip` on, in at most two pieces. Less if there are less.
    pub(crate) fn pieces(&self, skip: usize, len: usize) -> [&[u8]; 2] {
        let skip = skip.min(self.len);
        let len = len.min(self.len - skip);
        if len == 0 {
            return [&[], &[]];
        }
        let start = (self.head + skip) & (self.bytes.len() - 1);
        let first = len.min(self.bytes.len() - start);
        [&self.bytes[start..start + first], &self.bytes[..len - first]]
    }

    /// Drops the first `len` bytes.
    pub(crate) fn consume(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        self.head = if self.len == 0 { 0 } else { (self.head + len) & (self.bytes.len() - 1) };
    }

    /// Gives memory back when it is empty.
    pub(crate) fn shrink(&mut self) {
        if self.len == 0 && self.bytes.len() > SMALLEST {
            *self = Self::default();
        }
    }

    fn grow(&mut self, wanted: usize) {
        if wanted <= self.bytes.len() {
            return;
        }
        let mut bytes = vec![0; wanted.next_power_of_two().max(SMALLEST)];
        let [a, b] = self.pieces(0, self.len);
        bytes[..a.len()].copy_from_slice(a);
        bytes[a.len()..a.len() + b.len()].copy_from_slice(b);
        (self.bytes, self.head) = (bytes, 0);
    }

    /// Adds as much of `data` as fits below `limit` bytes, and says how much that was.
    pub(crate) fn push(&mut self, data: &[u8], limit: usize) -> usize {
        let data = &data[..data.len().min(limit.saturating_sub(self.len))];
        if data.is_empty() {
            return 0;
        }
        self.grow(self.len + data.len());
        let tail = (self.head + self.len) & (self.bytes.len() - 1);
        let first = data.len().min(self.bytes.len() - tail);
        self.bytes[tail..tail + first].copy_from_slice(&data[..first]);
        self.bytes[..data.len() - first].copy_from_slice(&data[first..]);
        self.len += data.len();
        data.len()
    }

    /// Reads from `source` once, up to `limit` bytes in all. Zero is the end, or no room.
    pub(crate) fn fill(&mut self, mut source: impl Read, limit: usize) -> io::Result<usize> {
        if self.len >= limit {
            return Ok(0);
        }
        if self.len == self.bytes.len() {
            self.grow((self.bytes.len() * 4).clamp(SMALLEST, limit.max(SMALLEST)));
        }
        let room = (self.bytes.len() - self.len).min(limit - self.len);
        let tail = (self.head + self.len) & (self.bytes.len() - 1);
        let first = room.min(self.bytes.len() - tail);
        let (low, high) = self.bytes.split_at_mut(tail);
        let got = source.read_vectored(&mut [
            IoSliceMut::new(&mut high[..first]),
            IoSliceMut::new(&mut low[..room - first]),
        ])?;
        self.len += got;
        Ok(got)
    }

    /// Writes to `sink` once and drops what it took.
    pub(crate) fn drain(&mut self, mut sink: impl Write) -> io::Result<usize> {
        let [a, b] = self.pieces(0, self.len);
        let taken = sink.write_vectored(&[IoSlice::new(a), IoSlice::new(b)])?;
        self.consume(taken);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_across_every_wrap() {
        let (mut ring, mut next_in, mut next_out) = (Ring::default(), 0_u8, 0_u8);
        for step in 1..4000_usize {
            let data: Vec<u8> = (0..step * 7 % 1999).map(|i| next_in.wrapping_add(i as u8)).collect();
            let taken = if step % 2 == 0 {
                ring.push(&data, 40_000)
            } else {
                ring.fill(&data[..], 40_000).unwrap_or(0)
            };
            assert!(ring.len() <= 40_000 && ring.capacity() <= 65_536);
            next_in = next_in.wrapping_add(taken as u8);
            let mut out = Vec::new();
            if step % 3 == 0 {
                ring.drain(&mut out).unwrap_or(0);
            } else {
                out = ring.pieces(0, step % 900).concat();
                ring.consume(out.len());
            }
            for byte in out {
                assert_eq!(byte, next_out);
                next_out = next_out.wrapping_add(1);
            }
        }
    }
}
