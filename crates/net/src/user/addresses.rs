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

/// Addresses that would mean the host itself or its own link, or that are nobody's: loopback by any spelling, link-local (where
/// clouds keep their machines' credentials), multicast, broadcast, unspecified.
fn is_out_of_reach(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            ip.is_loopback() || ip.is_link_local() || ip.octets()[0] == 0 || ip.octets()[0] >= 224
        }
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip.to_ipv4().is_some()
        }
    }
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
        ] {
            assert_eq!(way(text.parse().expect(text)), Way::None, "{text}");
        }
        assert_eq!(way("10.0.2.2:80".parse().unwrap()), Way::Host("127.0.0.1:80".parse().unwrap()));
        assert_eq!(way("9.9.9.9:80".parse().unwrap()), Way::Host("9.9.9.9:80".parse().unwrap()));
        assert_eq!(way("10.0.2.3:53".parse().unwrap()), Way::Resolver);
    }
}
