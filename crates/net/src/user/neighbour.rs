//! Who has which address: ARP (RFC 826) and neighbour discovery with router advertisements (RFC 4861, RFC 8106).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::user::addresses::{DNS6, GATEWAY_MAC, GATEWAY6, ROUTER6, is_ours};
use crate::user::outlet::Outlet;
use crate::wire::{ARP, Packet};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;

/// Answers an ARP request for one of our addresses.
pub(crate) fn arp(body: &[u8], out: &mut Outlet) -> Option<()> {
    // Ethernet, IPv4, lengths 6 and 4, a request.
    if body.get(..8)? != [0, 1, 8, 0, 6, 4, 0, 1] {
        return None;
    }
    let target: [u8; 4] = body.get(24..28)?.try_into().ok()?;
    if is_ours(Ipv4Addr::from(target).into()) {
        let mut answer = vec![0, 1, 8, 0, 6, 4, 0, 2];
        answer.extend_from_slice(&GATEWAY_MAC);
        answer.extend_from_slice(&target);
        answer.extend_from_slice(&body[8..18]);
        out.raw(ARP, &answer);
    }
    Some(())
}

/// Answers ICMPv6's solicitations.
pub(crate) fn icmp6(packet: &Packet<'_>, mtu: u16, restrict: bool, out: &mut Outlet) -> Option<()> {
    let message = packet.payload;
    // Nothing from beyond the link (RFC 4861 6.1.1, 7.1.1).
    if packet.hops != 255 {
        return None;
    }
    let to = if packet.source.is_unspecified() { ALL_NODES.into() } else { packet.source };
    match *message.first()? {
        ROUTER_SOLICITATION => out.icmp([ROUTER6.into(), to], &advertisement(mtu, restrict)),
        NEIGHBOUR_SOLICITATION => {
            let target: [u8; 16] = message.get(8..24)?.try_into().ok()?;
            let target = IpAddr::from(target);
            if is_ours(target) {
                // Router, override; solicited if there is somebody to answer.
                let flags = if packet.source.is_unspecified() { 0xa0 } else { 0xe0 };
                let mut answer = vec![136, 0, 0, 0, flags, 0, 0, 0];
                answer.extend_from_slice(&message[8..24]);
                answer.extend_from_slice(&[2, 1]);
                answer.extend_from_slice(&GATEWAY_MAC);
                out.icmp([target, to], &answer);
            }
        }
        _ => return None,
    }
    Some(())
}

/// A router advertisement. Without a way out there is no default router and no resolver.
fn advertisement(mtu: u16, restrict: bool) -> Vec<u8> {
    const LIFETIME: u16 = 9000;
    let lifetime = if restrict { 0 } else { LIFETIME };
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend_from_slice(&lifetime.to_be_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[1, 1]);
    message.extend_from_slice(&GATEWAY_MAC);
    message.extend_from_slice(&[5, 1, 0, 0]);
    message.extend_from_slice(&u32::from(mtu).to_be_bytes());
    // A /64 on the link, for addresses of the guest's own making, without end.
    message.extend_from_slice(&[3, 4, 64, 0xc0]);
    message.extend_from_slice(&[0xff; 8]);
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&GATEWAY6.octets()[..8]);
    message.extend_from_slice(&[0; 8]);
    if !restrict {
        message.extend_from_slice(&[25, 3, 0, 0]);
        message.extend_from_slice(&u32::from(LIFETIME).to_be_bytes());
        message.extend_from_slice(&DNS6.octets());
    }
    message
}
