//! The DHCP server (RFC 2131): one address for one guest.

use std::net::Ipv4Addr;

use crate::user::addresses::{DNS, GATEWAY, GUEST};

const MAGIC: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// The value of option `wanted`.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [255, ..] | [] | [_] => return None,
            [code, len, rest @ ..] => {
                let value = rest.get(..usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                options = &rest[usize::from(*len)..];
            }
        }
    }
}

/// The answer to a client's message and where it goes, if there is to be one.
pub(crate) fn answer(message: &[u8], mtu: u16, restrict: bool) -> Option<(Vec<u8>, Ipv4Addr)> {
    if message.get(..3)? != [1, 1, 6] || message.get(236..240)? != MAGIC {
        return None;
    }
    let options = &message[240..];
    let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from);
    let client = address(&message[12..16])?;
    let kind = match *option(options, 53)?.first()? {
        DISCOVER => OFFER,
        REQUEST => {
            if option(options, 54).and_then(address).is_some_and(|server| server != GATEWAY) {
                return None;
            }
            let wanted = option(options, 50).and_then(address).unwrap_or(client);
            if wanted == GUEST { ACK } else { NAK }
        }
        INFORM => ACK,
        _ => return None,
    };
    let mut out = vec![0; 236];
    out[..3].copy_from_slice(&[2, 1, 6]);
    out[4..8].copy_from_slice(&message[4..8]);
    out[10..12].copy_from_slice(&message[10..12]);
    out[28..44].copy_from_slice(&message[28..44]);
    if kind != NAK {
        out[16..20].copy_from_slice(&GUEST.octets());
        out[20..24].copy_from_slice(&GATEWAY.octets());
    }
    out.extend_from_slice(&MAGIC);
    let mut put = |code: u8, value: &[u8]| {
        out.extend_from_slice(&[code, value.len() as u8]);
        out.extend_from_slice(value);
    };
    put(53, &[kind]);
    put(54, &GATEWAY.octets());
    if kind != NAK {
        put(51, &86_400_u32.to_be_bytes());
        put(1, &[255, 255, 255, 0]);
        put(26, &mtu.to_be_bytes());
        if !restrict {
            put(3, &GATEWAY.octets());
            put(6, &DNS.octets());
        }
    }
    out.push(255);
    // Some clients want the size that BOOTP had.
    out.resize(out.len().max(300), 0);
    let to = if kind == NAK || message[10] & 0x80 != 0 { Ipv4Addr::BROADCAST } else { GUEST };
    Some((out, to))
}
