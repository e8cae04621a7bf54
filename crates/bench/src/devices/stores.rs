//! The files behind the measured disks, and the servers behind the network: the same for all sides.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::catalogue::Device;
use crate::host::{FileError, at};
use crate::root::native::Native;

/// Folder of the disks' files, in the root's files so that the host's programs find them.
const FOLDER: &str = "data";
/// Bytes of a disk: they stay in the page cache.
const SIZE: u64 = 512 << 20;

/// Why there is nothing to measure on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "qemu-img, which makes the qcow2 disk, does not work; install qemu-utils, or leave qcow2 out by --tests. {0}"
    )]
    QemuImg(String),
    #[error("the server `{0}` cannot be started from the image's files")]
    Server(&'static str, #[source] io::Error),
}

/// The file behind a disk: its name on the host, and in the root's files.
pub(crate) fn file(root: &Path, device: Device) -> (PathBuf, String) {
    let inside = format!("{FOLDER}/{}", device.name());
    (root.join(&inside), format!("/{inside}"))
}

/// Makes the files that are not there. All of their blocks are written.
pub(crate) fn make(root: &Path, devices: &[Device]) -> Result<(), StoreError> {
    let folder = root.join(FOLDER);
    fs::create_dir_all(&folder).map_err(at("create", &folder))?;
    for &device in devices.iter().filter(|device| **device != Device::Net) {
        let (path, _) = file(root, device);
        if path.exists() {
            continue;
        }
        let work = path.with_extension("work");
        let raw = if device == Device::Qcow2 { path.with_extension("raw") } else { work.clone() };
        write_raw(&raw).map_err(at("write", &raw))?;
        if device == Device::Qcow2 {
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&work);
            let output = command.output().map_err(|error| StoreError::QemuImg(error.to_string()))?;
            if !output.status.success() {
                return Err(StoreError::QemuImg(String::from_utf8_lossy(&output.stderr).into_owned()));
            }
            fs::remove_file(&raw).map_err(at("remove", &raw))?;
        }
        fs::rename(&work, &path).map_err(at("create", &path))?;
    }
    Ok(())
}

/// Numbers that do not repeat, so that nothing is a hole or compresses.
fn write_raw(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = vec![0; 1 << 20];
    for _ in 0..SIZE / block.len() as u64 {
        for bytes in block.chunks_exact_mut(8) {
            number ^= number << 13;
            number ^= number >> 7;
            number ^= number << 17;
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()
}

/// Has the files in the page cache, and nothing of them waiting to be written, whoever used them before.
pub(crate) fn warm(root: &Path, devices: &[Device]) -> Result<(), StoreError> {
    for &device in devices.iter().filter(|device| **device != Device::Net) {
        let (path, _) = file(root, device);
        let mut open = File::options().read(true).write(true).open(&path).map_err(at("open", &path))?;
        open.sync_all().map_err(at("synchronise", &path))?;
        let mut block = vec![0; 1 << 20];
        while open.read(&mut block).map_err(at("read", &path))? > 0 {}
    }
    Ok(())
}

/// Ports of the servers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    /// iperf3's.
    pub(crate) throughput: u16,
    /// qperf's, for its own affairs and for what it measures.
    pub(crate) control: u16,
    pub(crate) data: u16,
}

/// The servers, on the host's loopback. They end with this.
#[derive(Debug)]
pub(crate) struct Servers {
    pub(crate) ports: Ports,
    children: Vec<Child>,
}

impl Servers {
    /// Starts them from the image's files.
    pub(crate) fn start(native: &Native) -> Result<Self, StoreError> {
        let free = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            Ok::<u16, io::Error>(listener.local_addr()?.port())
        };
        let port = || free().map_err(|error| StoreError::Server("iperf3", error));
        let ports = Ports { throughput: port()?, control: port()?, data: port()? };
        let mut servers = Self { ports, children: Vec::new() };
        let (throughput, control) = (ports.throughput.to_string(), ports.control.to_string());
        for (name, words) in [
            ("iperf3", &["/usr/bin/iperf3", "-s", "-p", &throughput][..]),
            ("qperf", &["/usr/bin/qperf", "--listen_port", &control]),
        ] {
            let mut command = native.server(words);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            servers.children.push(command.spawn().map_err(|error| StoreError::Server(name, error))?);
        }
        // Until they listen: they say nothing.
        std::thread::sleep(std::time::Duration::from_millis(500));
        Ok(servers)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
