//! I/O commands (6): each becomes one request to a disk.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ringfence_disk::{Access, Buffers, Done, Extent, IoError, IoKind, Operation, Request};

use super::command::{Command, Outcome, Ticket};
use super::spec::{ALL_NAMESPACES, MAX_TRANSFER, Status, io};
use super::{Controller, Namespace, prp};
use crate::device::lock;

/// Force unit access: the write is durable when it completes.
const FUA: u32 = 1 << 30;
/// Write Zeroes: the blocks may be deallocated.
const DEALLOCATE_ZEROES: u32 = 1 << 25;
/// Dataset Management: the ranges are to be deallocated.
const DEALLOCATE: u32 = 1 << 2;
/// Bytes of a range of Dataset Management.
const RANGE: usize = 16;

/// What the guest is told of a disk's error.
fn status(error: IoError) -> Status {
    match error {
        IoError::OutOfRange => Status::LBA_OUT_OF_RANGE,
        IoError::Misaligned => Status::INVALID_FIELD,
        IoError::ReadOnly => Status::WRITE_PROTECTED,
        IoError::NoSpace => Status::CAPACITY_EXCEEDED,
        IoError::Abandoned => Status::ABORT_REQUESTED,
        IoError::Host(IoKind::Read) => Status::READ_ERROR,
        IoError::Host(IoKind::Flush) => Status::FLUSH_FAULT,
        IoError::Host(IoKind::Write | IoKind::Discard | IoKind::WriteZeroes) => Status::WRITE_FAULT,
    }
}

impl Namespace {
    /// Blocks as bytes, if the namespace has them.
    fn extent(&self, start: u64, blocks: u64) -> Result<Extent, Status> {
        if start.checked_add(blocks).is_none_or(|end| end > self.blocks) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        Ok(Extent { offset: start << self.block_shift, len: blocks << self.block_shift })
    }

    /// The blocks that a command names in its words 10 to 12.
    fn command_extent(&self, command: &Command) -> Result<Extent, Status> {
        self.extent(command.start_block(), u64::from(command.cdw12() & 0xffff) + 1)
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::WRITE_PROTECTED) } else { Ok(()) }
    }
}

impl Controller {
    /// Starts a command. Returns the namespaces whose disks have to be kicked, a bit for each.
    pub(super) fn run_io(&self, command: &Command, ticket: Ticket, durable: bool) -> u64 {
        match command.check_form().and_then(|()| self.io(command, ticket, durable)) {
            Ok(used) => used,
            Err(status) => {
                self.complete(ticket, Outcome::failed(status));
                0
            }
        }
    }

    fn io(&self, command: &Command, ticket: Ticket, durable: bool) -> Result<u64, Status> {
        if !io::ALL.iter().any(|(opcode, _)| *opcode == command.opcode()) {
            return Err(Status::INVALID_OPCODE);
        }
        if command.opcode() == io::FLUSH && command.namespace() == ALL_NAMESPACES {
            return Ok(self.flush_every(ticket));
        }
        let (index, namespace) = self.namespace(command.namespace())?;
        if command.opcode() == io::DATASET_MANAGEMENT && command.cdw11() & DEALLOCATE == 0 {
            // Hints on how the ranges will be used.
            self.ranges(command, namespace)?;
            self.complete(ticket, Outcome::done(0));
            return Ok(0);
        }
        let (operation, moved) = self.operation(command, namespace, durable)?;
        let done = self.done(ticket, moved);
        namespace.disk.submit(Request { operation, done });
        Ok(1 << index)
    }

    /// What completes a command.
    fn done(&self, ticket: Ticket, moved: Option<(bool, u64)>) -> Done {
        let me = self.me.upgrade();
        Box::new(move |result| {
            let outcome = match result {
                Ok(()) => Outcome { moved, ..Outcome::done(0) },
                Err(error) => Outcome::failed(status(error)),
            };
            if let Some(me) = me {
                me.complete(ticket, outcome);
            }
        })
    }

    /// What the disk is to do, and how many bytes it moves.
    fn operation(
        &self,
        command: &Command,
        namespace: &Namespace,
        durable: bool,
    ) -> Result<(Operation, Option<(bool, u64)>), Status> {
        let durable = durable || command.cdw12() & FUA != 0;
        match command.opcode() {
            io::READ => {
                let (Extent { offset, len }, buffers) = self.transfer(command, namespace, Access::Fill)?;
                Ok((Operation::Read { offset, buffers }, Some((false, len))))
            }
            io::WRITE => {
                namespace.check_writable()?;
                let (Extent { offset, len }, buffers) = self.transfer(command, namespace, Access::Take)?;
                Ok((Operation::Write { offset, buffers, durable }, Some((true, len))))
            }
            io::WRITE_ZEROES => {
                namespace.check_writable()?;
                let extent = namespace.command_extent(command)?;
                let deallocate = command.cdw12() & DEALLOCATE_ZEROES != 0;
                Ok((Operation::WriteZeroes { extent, deallocate, durable }, None))
            }
            io::DATASET_MANAGEMENT => {
                namespace.check_writable()?;
                Ok((Operation::Discard(self.ranges(command, namespace)?), None))
            }
            _ => Ok((Operation::Flush, None)),
        }
    }

    /// The blocks of a read or write and the memory for them.
    fn transfer(
        &self,
        command: &Command,
        namespace: &Namespace,
        access: Access,
    ) -> Result<(Extent, Buffers), Status> {
        let blocks = u64::from(command.cdw12() & 0xffff) + 1;
        if blocks << namespace.block_shift > MAX_TRANSFER {
            return Err(Status::INVALID_FIELD);
        }
        let extent = namespace.command_extent(command)?;
        let pieces = prp::pieces(&self.memory, command.prp1(), command.prp2(), extent.len)?;
        let buffers = Buffers::guest(&self.memory, access, pieces);
        Ok((extent, buffers.map_err(|_| Status::DATA_TRANSFER_ERROR)?))
    }

    /// The ranges of a Dataset Management command (6.7.1.1).
    fn ranges(&self, command: &Command, namespace: &Namespace) -> Result<Vec<Extent>, Status> {
        let count = (command.cdw10() & 0xff) as usize + 1;
        let mut bytes = vec![0; count * RANGE];
        let pieces = prp::pieces(&self.memory, command.prp1(), command.prp2(), bytes.len() as u64)?;
        let buffers = Buffers::guest(&self.memory, Access::Take, pieces);
        buffers.map_err(|_| Status::DATA_TRANSFER_ERROR)?.copy_to(0, &mut bytes);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, b| value << 8 | u64::from(*b));
        let range = |range: &[u8]| namespace.extent(number(&range[8..]), number(&range[4..8]));
        bytes.chunks_exact(RANGE).map(range).collect()
    }

    /// Flushes all namespaces for one command.
    pub(super) fn flush_every(&self, ticket: Ticket) -> u64 {
        let done = Mutex::new(Some(self.done(ticket, None)));
        let failed = Mutex::new(Ok(()));
        let all = Arc::new((AtomicUsize::new(self.namespaces.len()), failed, done));
        for namespace in &self.namespaces {
            let all = Arc::clone(&all);
            let part = Box::new(move |result: Result<(), IoError>| {
                let (left, failed, done) = &*all;
                let mut failed = lock(failed);
                *failed = failed.and(result);
                if left.fetch_sub(1, Ordering::AcqRel) == 1
                    && let Some(done) = lock(done).take()
                {
                    done(*failed);
                }
            });
            namespace.disk.submit(Request { operation: Operation::Flush, done: part });
        }
        u64::MAX
    }
}
