"""Which addresses may be called: each notation of an address, each address that carries another, each kind of rule."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.shim.address_policy import AddressPolicy, Forbidden, is_public, read_address, read_url

PUBLIC = AddressPolicy(["public"])
PRIVATE = (
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.9",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
)


def carriers(address: str) -> list[str]:
    """IPv6 addresses whose packets may end at an IPv4 one."""
    number = int(ipaddress.IPv4Address(address))
    high, low = f"{number >> 16:x}", f"{number & 0xFFFF:x}"
    inverted = number ^ 0xFFFFFFFF
    return [
        f"::ffff:{address}",
        f"::ffff:{high}:{low}",
        f"::{high}:{low}",
        f"::ffff:0:{high}:{low}",
        f"64:ff9b::{high}:{low}",
        f"64:ff9b:1::{high}:{low}",
        f"2002:{high}:{low}::1",
        f"2001:0:{high}:{low}::",
        f"2001:0:808:808::{inverted >> 16:x}:{inverted & 0xFFFF:x}",
        f"2606:4700::5efe:{high}:{low}",
        f"2606:4700::200:5efe:{high}:{low}",
    ]


@pytest.mark.parametrize("address", PRIVATE)
def test_public_means_public_in_every_guise(address: str) -> None:
    for each in (address, *carriers(address)):
        parsed = ipaddress.ip_address(each)
        assert not PUBLIC.allows("hooks.example.com", parsed), each
        host = f"[{each}]" if ":" in each else each
        with pytest.raises(Forbidden):
            PUBLIC.check(f"http://{host}/")


@pytest.mark.parametrize(
    "host",
    [
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "2130706433",
        "127.1",
        "127.0.1",
        "0",
        "0x0",
        "127.0.0.1.",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "[fe80::1]",
        "[fd00::1]",
        "[ff02::1]",
        "[2001:db8::1]",
        "[::ffff:0x7f.1]",
        "localhost",
        "LOCALHOST",
        "a.localhost",
        "300.1.1.1",
        "1.2.3.4.5",
        "1.2.3.0x100",
        "example.123",
        "09.1.1.1",
    ],
)
def test_odd_spellings_of_this_machine_are_not_public(host: str) -> None:
    with pytest.raises(Forbidden):
        PUBLIC.check(f"http://{host}:8080/x")


def test_addresses_of_the_open_internet_are() -> None:
    for host in ("8.8.8.8", "0x08080808", "134744072", "[2606:4700::1111]", "[::ffff:8.8.8.8]", "[64:ff9b::808:808]"):
        assert PUBLIC.check(f"https://{host}/").port == 443
    assert PUBLIC.check("https://hooks.example.com/a?b=c").path == "/a?b=c"


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_a_carrier_is_never_worth_more_than_what_it_carries(address: ipaddress.IPv4Address) -> None:
    if not is_public(address):
        assert not any(PUBLIC.allows("h", ipaddress.ip_address(each)) for each in carriers(str(address)))


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_numbers_are_read_as_the_c_library_reads_them(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    a, b, c, d = address.packed
    spellings = (
        f"{number}",
        f"0x{number:x}",
        f"0{number:o}",
        f"{a}.{number & 0xFFFFFF}",
        f"{a}.{b}.{number & 0xFFFF}",
        f"0x{a:x}.0{b:o}.{c}.{d}",
    )
    for spelling in spellings:
        assert read_address(spelling) == address, spelling


def test_blocks_and_hosts_are_what_they_name() -> None:
    policy = AddressPolicy(["10.0.0.0/8", "fd00::/8", "hooks.internal", "localhost"])
    assert policy.check("http://10.9.8.7/").host == "10.9.8.7"
    assert policy.check("http://[fd00::5]:81/").authority == "[fd00::5]:81"
    assert policy.check("http://[::ffff:10.0.0.1]/").address is not None
    assert policy.allows("hooks.internal", ipaddress.ip_address("192.168.0.1"))
    assert policy.check("http://LocalHost:9/").host == "localhost"
    for url in ("http://8.8.8.8/", "http://11.0.0.1/", "http://[::ffff:11.0.0.1]/", "http://[2606:4700::1]/"):
        with pytest.raises(Forbidden):
            policy.check(url)
    # a name that is not listed may still turn out to lie in a listed block, and nowhere else
    assert policy.check("http://other.example/")
    assert policy.allows("other.example", ipaddress.ip_address("10.0.0.1"))
    assert not policy.allows("other.example", ipaddress.ip_address("192.168.0.1"))
    # a listed host is no way to addresses that are nobody's
    assert not policy.allows("hooks.internal", ipaddress.ip_address("0.0.0.0"))
    assert not policy.allows("hooks.internal", ipaddress.ip_address("::ffff:0.0.0.0"))


def test_a_host_alone_allows_no_other() -> None:
    policy = AddressPolicy(["hooks.example.com"])
    assert policy.check("https://Hooks.Example.com./x")
    for url in ("https://example.com/", "https://a.hooks.example.com/", "https://8.8.8.8/", "https://localhost/"):
        with pytest.raises(Forbidden, match="does not allow"):
            policy.check(url)


def test_nothing_is_allowed_by_default() -> None:
    for url in ("https://example.com/", "https://8.8.8.8/", "http://localhost/"):
        with pytest.raises(Forbidden):
            AddressPolicy([]).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "file:///etc/passwd",
        "//example.com/",
        "example.com",
        "http://",
        "http:///x",
        "http://user:secret@example.com/",
        "http://example.com@8.8.8.8/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:x/",
        "http://exa mple.com/",
        "http://example.com/\r\nHost: x",
        "http://example.com\\@8.8.8.8/",
        "http://exämple.com/",
        "http://[::1/",
        "http://[fe80::1%eth0]/",
        "http://a..b/%00" + "x" * 2100,
        "http://-a.com/",
    ],
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(Forbidden):
        AddressPolicy(["public"]).check(url)


def test_a_target_says_what_goes_on_the_wire() -> None:
    target = read_url("http://Hooks.example.com:8080?x=1#part")
    assert (target.host, target.port, target.path, target.authority) == (
        "hooks.example.com",
        8080,
        "/?x=1",
        "hooks.example.com:8080",
    )
