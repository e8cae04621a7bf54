//! What a user says of a network card: `--net`.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use crate::wire::Mac;

/// One network card and what it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// What it is connected to.
    pub backend: Backend,
    /// Its address, if not one of ours.
    pub mac: Option<Mac>,
    /// The largest IP packet, in bytes.
    pub mtu: u16,
    /// Bytes per second in each direction.
    pub bytes: Option<u64>,
    /// Packets per second in each direction.
    pub packets: Option<u64>,
    /// Pairs of queues, if not one for each vCPU.
    pub queues: Option<u16>,
}

/// Pairs of queues of a card, at most.
pub const MAX_QUEUES: u16 = 16;

/// What a card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The NAT in user mode.
    User(UserSpec),
    /// A tap device of the host.
    Tap(String),
}

/// The NAT in user mode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserSpec {
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// No way out but forwards.
    pub restrict: bool,
    /// The resolver to ask instead of the host's.
    pub dns: Option<SocketAddr>,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP instead of TCP.
    pub udp: bool,
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The guest's port.
    pub port: u16,
}

/// A `--net` that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetSpecError {
    /// Neither of the kinds.
    #[error("{0:?} is no network; say user, tap=NAME or none")]
    Kind(String),
    /// Not an option.
    #[error(
        "{0:?} is no option of this network; there are forward=, restrict=, dns= (of user), mac=, mtu=, bps=, pps= and queues="
    )]
    Option(String),
    /// A value that does not fit.
    #[error("{0:?} does not fit; say {1}")]
    Value(String, &'static str),
}

impl NetSpec {
    /// The NAT in user mode, without options.
    pub fn user() -> Self {
        let backend = Backend::User(UserSpec::default());
        Self { backend, mac: None, mtu: 1500, bytes: None, packets: None, queues: None }
    }
}

fn mac(text: &str) -> Option<Mac> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        *byte = parts
            .next()
            .filter(|part| part.len() == 2 && !part.starts_with('+'))
            .and_then(|p| u8::from_str_radix(p, 16).ok())?;
    }
    // The lowest bit marks groups (IEEE 802 8.2).
    (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(bytes)
}

fn forward(text: &str) -> Option<Forward> {
    let (protocol, rest) = text.split_once(':')?;
    let (listen, port) = rest.rsplit_once(':')?;
    let udp = match protocol {
        "tcp" => false,
        "udp" => true,
        _ => return None,
    };
    let port = port.parse().ok().filter(|&port| port != 0)?;
    Some(Forward { udp, listen: listen.parse().ok()?, port })
}

fn dns(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| Some(SocketAddr::new(text.parse().ok()?, 53)))
}

impl UserSpec {
    /// Takes an option of its own. `Ok(false)` if it is none.
    fn option(&mut self, name: &str, value: &str) -> Result<bool, &'static str> {
        match (name, value) {
            ("forward", _) => {
                self.forwards.push(
                    forward(value).ok_or("forward=tcp:127.0.0.1:2222:22, or udp:ADDRESS:PORT:GUEST-PORT")?,
                );
            }
            ("restrict", "yes") => self.restrict = true,
            ("restrict", "no") => self.restrict = false,
            ("restrict", _) => return Err("restrict=yes or restrict=no"),
            ("dns", _) => self.dns = Some(dns(value).ok_or("dns=ADDRESS or dns=ADDRESS:PORT")?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl FromStr for NetSpec {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        let mut parts = text.split(',');
        let mut spec = Self::user();
        let kind = parts.next().unwrap_or_default();
        match kind.split_once('=') {
            None if kind == "user" => {}
            // A tap's name goes into 16 bytes with a zero behind it.
            Some(("tap", name)) if (1..16).contains(&name.len()) => {
                spec.backend = Backend::Tap(name.to_owned());
            }
            _ => return Err(NetSpecError::Kind(kind.to_owned())),
        }
        for part in parts {
            let bad = |say| NetSpecError::Value(part.to_owned(), say);
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            if let Backend::User(user) = &mut spec.backend
                && user.option(name, value).map_err(bad)?
            {
                continue;
            }
            match name {
                "mac" => {
                    spec.mac = Some(
                        mac(value).ok_or_else(|| bad("mac=52:54:00:12:34:56, or another of six bytes"))?,
                    )
                }
                "mtu" => {
                    let mtu = value.parse().ok().filter(|mtu| (1280..=65_520).contains(mtu));
                    spec.mtu = mtu.ok_or_else(|| bad("mtu= with 1280 to 65520 bytes"))?;
                }
                "bps" => {
                    spec.bytes = Some(
                        ringfence_rate::parse(value)
                            .ok_or_else(|| bad("bytes per second, such as bps=10M"))?,
                    )
                }
                "pps" => {
                    spec.packets = Some(
                        ringfence_rate::parse(value)
                            .ok_or_else(|| bad("packets per second, such as pps=1000"))?,
                    );
                }
                "queues" => {
                    let queues = value.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                    spec.queues = Some(queues.ok_or_else(|| bad("queues= with 1 to 16 pairs"))?);
                }
                _ => return Err(NetSpecError::Option(part.to_owned())),
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            Backend::Tap(name) => write!(f, "tap={name}")?,
            Backend::User(user) => {
                f.write_str("user")?;
                for Forward { udp, listen, port } in &user.forwards {
                    write!(f, ",forward={}:{listen}:{port}", if *udp { "udp" } else { "tcp" })?;
                }
                if user.restrict {
                    f.write_str(",restrict=yes")?;
                }
                if let Some(dns) = user.dns {
                    write!(f, ",dns={dns}")?;
                }
            }
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        write!(f, ",mtu={}", self.mtu)?;
        if let Some(bytes) = self.bytes {
            write!(f, ",bps={bytes}")?;
        }
        if let Some(packets) = self.packets {
            write!(f, ",pps={packets}")?;
        }
        if let Some(queues) = self.queues {
            write!(f, ",queues={queues}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "user",
            "user,forward=tcp:127.0.0.1:2222:22,forward=udp:[::1]:53:53,restrict=yes,dns=127.0.0.1:5353",
            "tap=tap0,mac=52:54:00:12:34:56,mtu=9000,bps=10M,pps=5,queues=4",
        ] {
            let spec: NetSpec = text.parse().expect(text);
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "users",
            "tap=",
            "tap=abcdefghijklmnop",
            "user,forward=tcp:1:2",
            "user,forward=sctp:127.0.0.1:1:1",
            "user,forward=tcp:127.0.0.1:1:0",
            "user,mac=01:00:00:00:00:00",
            "user,mtu=5",
            "user,bps=0",
            "user,queues=0",
            "user,queues=17",
            "user,queues=x",
            "tap=t,restrict=yes",
            "user,restrict",
            "user,what=1",
            "user,mac=52:54:00:12:34:56:78",
        ] {
            assert!(text.parse::<NetSpec>().is_err(), "{text}");
        }
    }
}
