//! Which resolver DNS questions go to: the host's, whatever it is at the moment.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How long what was read is taken for true.
const FRESH: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Resolver {
    fixed: Option<SocketAddr>,
    file: PathBuf,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
    servers: Vec<IpAddr>,
    turn: usize,
}

impl Resolver {
    pub(crate) fn new(fixed: Option<SocketAddr>) -> Self {
        let file = PathBuf::from("/etc/resolv.conf");
        Self { fixed, file, changed: None, looked: None, servers: Vec::new(), turn: 0 }
    }

    /// The server to ask now.
    pub(crate) fn server(&mut self, now: Instant) -> SocketAddr {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        if self.looked.is_none_or(|looked| now > looked + FRESH) {
            self.looked = Some(now);
            let changed = std::fs::metadata(&self.file).and_then(|data| data.modified()).ok();
            if changed.is_none() || changed != self.changed {
                self.changed = changed;
                self.servers = parse(&std::fs::read_to_string(&self.file).unwrap_or_default());
                self.turn = 0;
            }
        }
        // As resolv.conf(5) has it: without a server, the one on this host.
        let local = IpAddr::from([127, 0, 0, 1]);
        let count = self.servers.len().max(1);
        SocketAddr::new(self.servers.get(self.turn % count).copied().unwrap_or(local), 53)
    }

    /// `server` has not answered; the next is asked from now on.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        let count = self.servers.len().max(1);
        if self.servers.get(self.turn % count) == Some(&server.ip()) {
            self.turn = self.turn.wrapping_add(1);
        }
    }
}

/// The name servers of a `resolv.conf`. Addresses with a zone are left out: a link-local server is not asked.
fn parse(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| line.strip_prefix("nameserver")?.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(server).take(8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_followed_and_servers_take_turns() {
        let file = std::env::temp_dir().join(format!("ringfence-resolv-{}", std::process::id()));
        std::fs::write(&file, "# x\nnameserver 192.0.2.1\noptions a\nnameserver\t2001:db8::1\n").unwrap();
        let mut resolver = Resolver { file: file.clone(), ..Resolver::new(None) };
        let now = Instant::now();
        let first = resolver.server(now);
        assert_eq!(first, "192.0.2.1:53".parse().unwrap());
        resolver.failed(first);
        assert_eq!(resolver.server(now), "[2001:db8::1]:53".parse().unwrap());
        std::fs::remove_file(&file).unwrap();
        assert_eq!(resolver.server(now + FRESH * 2), "127.0.0.1:53".parse().unwrap());
    }
}
