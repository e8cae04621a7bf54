//! Which resolver DNS questions go to: the host's, whatever it is at the moment.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// Where servers listen (RFC 1035 4.2).
const PORT: u16 = 53;
/// How long what was read is taken for true.
const FRESH: Duration = Duration::from_secs(1);
/// How long a server may take to answer before the next is asked: with [`TIDY`](super::stack) less than the five seconds after
/// which guests ask again.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// A question on its way.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) server: SocketAddr,
    pub(crate) at: Instant,
    /// Servers that can be asked after this one.
    pub(crate) left: usize,
    pub(crate) question: Vec<u8>,
}

impl Asked {
    /// Whether an answer is overdue.
    pub(crate) fn is_overdue(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= PATIENCE
    }
}

#[derive(Debug)]
pub(crate) struct Resolver {
    fixed: Option<SocketAddr>,
    file: PathBuf,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
    servers: Vec<SocketAddr>,
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
        let local = SocketAddr::from(([127, 0, 0, 1], PORT));
        self.servers.get(self.turn % self.count()).copied().unwrap_or(local)
    }

    /// How many servers there are to be tried in turn.
    pub(crate) fn count(&self) -> usize {
        if self.fixed.is_some() { 1 } else { self.servers.len().max(1) }
    }

    /// `server` has not answered; the next is asked from now on.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        if self.servers.get(self.turn % self.count()) == Some(&server) {
            self.turn = self.turn.wrapping_add(1);
        }
    }

    /// Asks these, whatever the host does.
    #[cfg(test)]
    pub(crate) fn of(servers: Vec<SocketAddr>) -> Self {
        let never = Instant::now() + Duration::from_secs(1 << 30);
        Self { servers, looked: Some(never), ..Self::new(None) }
    }
}

/// The name servers of a `resolv.conf`. Addresses with a zone are left out: a link-local server is not asked.
fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let ip = line.strip_prefix("nameserver")?.split_whitespace().next()?.parse::<IpAddr>().ok()?;
        Some(SocketAddr::new(ip, PORT))
    };
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
        resolver.failed(first);
        assert_eq!(resolver.server(now), "[2001:db8::1]:53".parse().unwrap(), "it was another's turn");
        std::fs::write(&file, "nameserver 192.0.2.7\nnameserver fe80::1%eth0\n").unwrap();
        // Whatever the file system's clock counts in.
        let times = std::fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        std::fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        assert_eq!(resolver.server(now), "[2001:db8::1]:53".parse().unwrap(), "not looked at yet");
        assert_eq!(resolver.server(now + FRESH * 2), "192.0.2.7:53".parse().unwrap());
        std::fs::remove_file(&file).unwrap();
        assert_eq!(resolver.server(now + FRESH * 4), "127.0.0.1:53".parse().unwrap());
    }
}
