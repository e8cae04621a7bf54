//! Who is who on the guest's side, and what the guest may reach.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::wire::Mac;

/// The gateway's Ethernet address.
pub(crate) const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
/// The gateway; it stands for the host's loopback address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The DNS forwarder.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What DHCP gives the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The same in IPv6: unique local addresses (RFC 4193); the guest makes its own within the /64.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 2);
/// The DNS forwarder in IPv6.
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x696e, 0x6766, 0, 0, 0, 0, 3);
/// The router's link-local address.
pub(crate) const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Where a guest's packet leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To this address, as the host sees it.
    Host(SocketAddr),
    /// To the resolver.
    Resolver,
    /// Nowhere.
    None,
}

/// Whether an address is one of ours on the guest's link.
pub(crate) fn is_ours(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip == GATEWAY || ip == DNS,
        IpAddr::V6(ip) => ip == GATEWAY6 || ip == DNS6 || ip == ROUTER6,
    }
}

fn on_link(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..3] == GATEWAY.octets()[..3],
        IpAddr::V6(ip) => ip.octets()[..8] == GATEWAY6.octets()[..8],
    }
}

/// Where clouds keep their machines' credentials, beside 169.254.0.0/16: Alibaba's, Amazon's two, Google's.
const CREDENTIALS: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// Addresses that would mean the host itself or its own link, or that are nobody's: loopback by any spelling, link-local and others (where
/// clouds keep their machines' credentials), multicast, broadcast, unspecified.
fn is_out_of_reach(ip: IpAddr) -> bool {
    CREDENTIALS.contains(&ip)
        || match ip {
            IpAddr::V4(ip) => {
                ip.is_loopback() || ip.is_link_local() || ip.octets()[0] == 0 || ip.octets()[0] >= 224
            }
            IpAddr::V6(ip) => {
                ip.is_loopback()
                    || ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_unicast_link_local()
                    || ip.to_ipv4().is_some()
                    || translated(ip).is_some_and(|ip| is_out_of_reach(ip.into()))
            }
        }
}

/// The IPv4 address that a network with NAT64 sends a packet on to (RFC 6052 2.1).
fn translated(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] = ip.octets() else { return None };
    Some(Ipv4Addr::new(a, b, c, d))
}

/// The way of a packet to `remote`.
pub(crate) fn way(remote: SocketAddr) -> Way {
    let (ip, port) = (remote.ip(), remote.port());
    match ip {
        IpAddr::V4(GATEWAY) => Way::Host((Ipv4Addr::LOCALHOST, port).into()),
        IpAddr::V6(GATEWAY6) => Way::Host((Ipv6Addr::LOCALHOST, port).into()),
        IpAddr::V4(DNS) | IpAddr::V6(DNS6) if port == 53 => Way::Resolver,
        _ if port == 0 || on_link(ip) || is_out_of_reach(ip) => Way::None,
        _ => Way::Host(remote),
    }
}

/// Whether the guest may send as `ip`.
pub(crate) fn is_a_guests(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => on_link(ip) && !is_ours(ip) && !matches!(v4.octets()[3], 0 | 255),
        IpAddr::V6(v6) => !is_ours(ip) && (on_link(ip) || v6.is_unicast_link_local()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_itself_is_reached_by_the_gateway_only() {
        for text in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "255.255.255.255:67",
            "10.0.2.99:1",
            "10.0.2.3:54",
            "224.0.0.1:5",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[::127.0.0.1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "100.100.100.200:80",
            "[fd00:ec2::254]:80",
            "[fd00:ec2::23]:80",
            "[fd20:ce::254]:80",
            "[64:ff9b::169.254.169.254]:80",
            "[64:ff9b::127.0.0.1]:80",
            "[64:ff9b::100.100.100.200]:80",
        ] {
            assert_eq!(way(text.parse().expect(text)), Way::None, "{text}");
        }
        assert_eq!(way("10.0.2.2:80".parse().unwrap()), Way::Host("127.0.0.1:80".parse().unwrap()));
        assert_eq!(way("9.9.9.9:80".parse().unwrap()), Way::Host("9.9.9.9:80".parse().unwrap()));
        assert_eq!(way("10.0.2.3:53".parse().unwrap()), Way::Resolver);
        for text in ["100.100.100.201:80", "[fd00:ec2::253]:53", "[64:ff9b::9.9.9.9]:80", "[2001:db8::1]:80"]
        {
            assert_eq!(way(text.parse().unwrap()), Way::Host(text.parse().unwrap()));
        }
    }
}
