//! Memory between two mappings, and files that are not to be mapped.

use std::fs::File;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::*;

const SIZE: usize = 3 * 4096;

fn unsealed(size: usize) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, size as u64).unwrap();
    file
}

#[test]
fn what_one_writes_the_other_reads() {
    let (one, file) = SharedMemory::create("test", SIZE).unwrap();
    let other = SharedMemory::open(file.as_fd(), SIZE).unwrap();
    one.store(64, 0x1234_5678_u32);
    one.write(SIZE - 5, b"bytes");
    let mut bytes = [0; 5];
    other.read(SIZE - 5, &mut bytes);
    assert_eq!((other.load::<u32>(64), &bytes), (0x1234_5678, b"bytes"));
    assert_eq!(other.load::<u16>(66), 0x1234);
}

#[test]
fn nobody_can_shrink_or_grow_it() {
    let (_one, file) = SharedMemory::create("test", SIZE).unwrap();
    assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
    assert_eq!(ftruncate(&file, 2 * SIZE as u64), Err(Errno::PERM));
}

#[test]
fn closed_file_gives_no_new_way_in_and_the_old_ones_work() {
    let (one, file) = SharedMemory::create("test", SIZE).unwrap();
    let other = SharedMemory::open(file.as_fd(), SIZE).unwrap();
    SharedMemory::close(&file);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(&file, punch, 0, 4096), Err(Errno::PERM));
    assert_eq!(rustix::io::pwrite(&file, b"bytes", 0), Err(Errno::PERM));
    assert!(matches!(SharedMemory::open(file.as_fd(), SIZE), Err(SharedError::Host(_))));
    one.store(0, 7_u8);
    assert_eq!(other.load::<u8>(0), 7);
}

#[test]
fn files_that_could_go_away_are_refused() {
    let refused = |file: BorrowedFd<'_>| SharedMemory::open(file, SIZE).unwrap_err();
    assert!(matches!(refused(unsealed(SIZE).as_fd()), SharedError::NotSealed));
    let half = unsealed(SIZE);
    fcntl_add_seals(&half, SealFlags::GROW).unwrap();
    assert!(matches!(refused(half.as_fd()), SharedError::NotSealed));
    // No memory at all.
    assert!(matches!(refused(File::open("/dev/null").unwrap().as_fd()), SharedError::NotSealed));
    for is in [0, SIZE - 1, SIZE + 1, 2 * SIZE] {
        let file = unsealed(is);
        fcntl_add_seals(&file, FIXED).unwrap();
        assert!(matches!(refused(file.as_fd()), SharedError::Size { is: size, .. } if size == is as u64));
    }
}

#[test]
#[should_panic(expected = "not in shared memory")]
fn access_beyond_the_end_is_the_callers_bug() {
    let (one, _file) = SharedMemory::create("test", SIZE).unwrap();
    one.load::<u32>(SIZE - 3);
}

#[test]
#[should_panic(expected = "not in shared memory")]
fn access_beyond_all_addresses_is_the_callers_bug() {
    let (one, _file) = SharedMemory::create("test", SIZE).unwrap();
    one.write(usize::MAX - 1, b"bytes");
}
