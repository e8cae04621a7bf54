//! Programs of the guest that use vsock.
//!
//! `vsock echo PORT`: gives everything back that comes, until the other side's end of data.
//! `vsock send PORT CONNECTIONS BYTES SEED`: connects to the host so many times at once, sends, ends its data, and demands the same back. Prints
//! `ok` and the sum of all bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::thread;

#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn bind(socket: i32, address: *const Address, len: u32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
    fn accept(socket: i32, address: *mut Address, len: *mut u32) -> i32;
    fn connect(socket: i32, address: *const Address, len: u32) -> i32;
    fn shutdown(socket: i32, how: i32) -> i32;
}

const VSOCK: u16 = 40;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn open(port: u32, cid: u32) -> io::Result<(File, Address)> {
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(check(socket(VSOCK.into(), 1, 0))?) };
    Ok((file, Address { family: VSOCK, reserved: 0, port, cid, zero: [0; 4] }))
}

fn end(file: &File) {
    // SAFETY: a system call on an open descriptor.
    unsafe { shutdown(file.as_raw_fd(), 1) };
}

fn echo(port: u32) {
    let (file, address) = open(port, u32::MAX).unwrap();
    // SAFETY: the address is whole, and outlives the calls.
    unsafe {
        check(bind(file.as_raw_fd(), &address, 16)).unwrap();
        check(listen(file.as_raw_fd(), 128)).unwrap();
    }
    println!("listening");
    loop {
        // SAFETY: no address is asked for; the descriptor is new.
        let taken = unsafe { check(accept(file.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut())) };
        let mut stream = unsafe { File::from_raw_fd(taken.unwrap()) };
        thread::spawn(move || {
            let mut buffer = vec![0; 50_000];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n]).is_err() {
                    return;
                }
            }
            end(&stream);
        });
    }
}

fn exchange(port: u32, len: usize, seed: u64) -> io::Result<u64> {
    let (mut file, address) = open(port, 2)?;
    // SAFETY: the address is whole, and outlives the call.
    unsafe { check(connect(file.as_raw_fd(), &address, 16))? };
    let bytes = move || {
        let mut x = seed | 1;
        (0..len).map(move |_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        })
    };
    let mut writing = file.try_clone()?;
    let writer = thread::spawn(move || -> io::Result<()> {
        let data: Vec<u8> = bytes().collect();
        writing.write_all(&data)?;
        end(&writing);
        Ok(())
    });
    let mut back = Vec::new();
    file.read_to_end(&mut back)?;
    writer.join().unwrap()?;
    if !back.iter().copied().eq(bytes()) {
        return Err(io::Error::other("something else came back"));
    }
    Ok(back.iter().map(|byte| u64::from(*byte)).sum())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize| arguments[index].parse::<u64>().unwrap();
    match arguments[1].as_str() {
        "echo" => echo(number(2) as u32),
        _ => {
            let (port, len, seed) = (number(2) as u32, number(4) as usize, number(5));
            let threads: Vec<_> =
                (0..number(3)).map(|i| thread::spawn(move || exchange(port, len, seed + 2 * i))).collect();
            let results: Result<Vec<u64>, _> =
                threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            match results {
                Ok(sums) => println!("ok {}", sums.iter().sum::<u64>()),
                Err(error) => println!("failed: {error}"),
            }
        }
    }
}
