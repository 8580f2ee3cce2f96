#!/usr/bin/env bash
# Keys of a WireGuard network of two machines, and the run's secret: keys.sh EAST-ADDRESS [FOLDER]
set -euo pipefail
east=${1:?the public address of east}
folder=${2:-.}
umask 077

east_key=$(wg genkey) west_key=$(wg genkey) shared=$(wg genpsk)
east_public=$(wg pubkey <<<"$east_key") west_public=$(wg pubkey <<<"$west_key")

cat >"$folder/east.conf" <<END
[Interface]
Address = 10.77.0.1/24
ListenPort = 51820
PrivateKey = $east_key

[Peer]
PublicKey = $west_public
PresharedKey = $shared
AllowedIPs = 10.77.0.2/32
END
cat >"$folder/west.conf" <<END
[Interface]
Address = 10.77.0.2/24
PrivateKey = $west_key

[Peer]
PublicKey = $east_public
PresharedKey = $shared
Endpoint = $east:51820
AllowedIPs = 10.77.0.1/32
PersistentKeepalive = 25
END
openssl rand -base64 32 >"$folder/secret"
