use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::testing::{ENGINES, Image, buffers, pattern, read};
use crate::{DiskOptions, Operation, Request, open};

#[test]
fn many_requests_at_once_are_each_done_once() {
    const PIECES: usize = 600;
    for engine in ENGINES {
        let image = Image::new(&vec![0; PIECES * 2048]);
        let disk = image.open(&format!(",io={engine}"));
        let done = Arc::new(AtomicUsize::new(0));
        for piece in 0..PIECES {
            let buffers = buffers(&pattern(2048, piece as u8));
            let counter = Arc::clone(&done);
            let operation =
                Operation::Write { offset: (piece * 2048) as u64, buffers, durable: piece % 97 == 0 };
            let done = Box::new(move |result: Result<(), _>| {
                result.unwrap();
                counter.fetch_add(1, Ordering::SeqCst);
            });
            disk.submit(Request { operation, done });
            if piece % 7 == 0 {
                disk.kick();
            }
        }
        disk.kick();
        // Dropping the disk waits for what was submitted.
        drop(disk);
        while done.load(Ordering::SeqCst) < PIECES {
            std::thread::yield_now();
        }
        let disk = image.open("");
        for piece in [0, 1, 299, PIECES - 1] {
            let expected = pattern(2048, piece as u8);
            assert_eq!(read(&disk, (piece * 2048) as u64, 2048).unwrap(), expected, "{engine}");
        }
    }
}

#[test]
fn request_from_a_callback_needs_no_kick() {
    for engine in ENGINES {
        let image = Image::new(&pattern(4096, 1));
        let disk = image.open(&format!(",io={engine}"));
        let (sender, receiver) = std::sync::mpsc::channel();
        let again = Arc::clone(&disk);
        let done = Box::new(move |result: Result<(), _>| {
            result.unwrap();
            let done = Box::new(move |result| sender.send(result).unwrap());
            again.submit(Request { operation: Operation::Flush, done });
        });
        let operation = Operation::Write { offset: 0, buffers: buffers(&[3; 512]), durable: false };
        disk.submit(Request { operation, done });
        disk.kick();
        receiver.recv().unwrap().unwrap();
    }
}

#[test]
fn last_reference_may_go_in_a_callback() {
    for engine in ENGINES {
        let image = Image::new(&pattern(4096, 1));
        let disk = image.open(&format!(",io={engine}"));
        let (sender, receiver) = std::sync::mpsc::channel();
        let held = Arc::clone(&disk);
        let done = Box::new(move |result: Result<(), _>| {
            drop(held);
            sender.send(result).unwrap();
        });
        disk.submit(Request { operation: Operation::Flush, done });
        disk.kick();
        drop(disk);
        receiver.recv().unwrap().unwrap();
    }
}

#[test]
fn sleeping_engines_wake_up_for_every_request() {
    for engine in ENGINES {
        let image = Image::new(&vec![0; 64 * 512]);
        let disk = image.open(&format!(",io={engine}"));
        for round in 0..2000_u64 {
            let byte = round as u8;
            let operation =
                Operation::Write { offset: round % 64 * 512, buffers: buffers(&[byte; 512]), durable: false };
            crate::run(&disk, operation).unwrap();
            if round % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_micros(300));
            }
        }
    }
}

#[test]
fn threads_call_the_hook_first() {
    for (engine, threads) in ENGINES.into_iter().zip([4, 1, 0]) {
        let image = Image::new(&[0; 512]);
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let hook: crate::ThreadHook = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let spec = image.spec(&format!(",io={engine}"));
        let disk = open(&DiskOptions { thread_hook: Some(hook), ..DiskOptions::new(spec) }).unwrap();
        drop(disk);
        assert_eq!(calls.load(Ordering::SeqCst), threads, "{engine}");
    }
}
