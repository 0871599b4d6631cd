"""The bodies that policy looks into, as structs. Their fields are those of the Engine API's documents from v1.24 on.

What no rule looks at is `Any`. A field that the engine knows and these do not is refused by a strict policy; to let it
pass, add it here, with a rule if it can reach the host.

Source: the API documents v1.41 and v1.55, and for what they left out the types of moby (`api/types`).
"""

from typing import Any

import msgspec


class _Body(msgspec.Struct, rename="pascal", kw_only=True):
    """Absent and null are one to the engine."""


class Driver(_Body):
    name: str | None = None
    options: dict[str, str] | None = None


class BindOptions(_Body):
    propagation: str | None = None
    non_recursive: Any = None
    create_mountpoint: Any = None
    read_only_non_recursive: bool | None = None
    read_only_force_recursive: Any = None


class VolumeOptions(_Body):
    no_copy: Any = None
    labels: dict[str, str] | None = None
    driver_config: Driver | None = None
    subpath: Any = None


class TmpfsOptions(_Body):
    size_bytes: Any = None
    mode: Any = None
    options: list[list[str]] | None = None


class Mount(_Body):
    """`image_options` and `cluster_options` go with types that have a rule."""

    type: str | None = None
    source: str | None = None
    target: Any = None
    read_only: bool | None = None
    consistency: Any = None
    bind_options: BindOptions | None = None
    volume_options: VolumeOptions | None = None
    tmpfs_options: TmpfsOptions | None = None
    image_options: Any = None
    cluster_options: Any = None


class LogConfig(_Body):
    type: str | None = None
    config: dict[str, str] | None = None


class PortBinding(_Body):
    host_ip: str | None = None
    host_port: str | None = None


class Device(_Body):
    path_on_host: str | None = None
    path_in_container: Any = None
    cgroup_permissions: Any = None


class BlockDevice(_Body):
    path: str | None = None
    rate: Any = None
    weight: Any = None


class Ulimit(_Body):
    name: str | None = None
    hard: Any = None
    soft: Any = None


class Resources(_Body):
    """What a create and an update have in common."""

    cpu_shares: Any = None
    memory: int | None = None
    nano_cpus: int | None = None
    cgroup_parent: str | None = None
    blkio_weight: Any = None
    blkio_weight_device: list[BlockDevice] | None = None
    blkio_device_read_bps: list[BlockDevice] | None = None
    blkio_device_write_bps: list[BlockDevice] | None = None
    blkio_device_read_i_ops: list[BlockDevice] | None = msgspec.field(default=None, name="BlkioDeviceReadIOps")
    blkio_device_write_i_ops: list[BlockDevice] | None = msgspec.field(default=None, name="BlkioDeviceWriteIOps")
    cpu_period: int | None = None
    cpu_quota: int | None = None
    cpu_realtime_period: Any = None
    cpu_realtime_runtime: Any = None
    cpuset_cpus: Any = None
    cpuset_mems: Any = None
    devices: list[Device] | None = None
    device_cgroup_rules: list[str] | None = None
    device_requests: list[Any] | None = None
    kernel_memory: Any = None
    kernel_memory_tcp: Any = msgspec.field(default=None, name="KernelMemoryTCP")
    memory_reservation: Any = None
    memory_swap: int | None = None
    memory_swappiness: Any = None
    oom_kill_disable: bool | None = None
    init: Any = None
    pids_limit: int | None = None
    ulimits: list[Ulimit] | None = None
    cpu_count: Any = None
    cpu_percent: Any = None
    io_maximum_i_ops: Any = msgspec.field(default=None, name="IOMaximumIOps")
    io_maximum_bandwidth: Any = msgspec.field(default=None, name="IOMaximumBandwidth")


class ContainerUpdate(Resources):
    restart_policy: dict[str, Any] | None = None


class HostConfig(Resources):
    binds: list[str] | None = None
    container_id_file: Any = msgspec.field(default=None, name="ContainerIDFile")
    log_config: LogConfig | None = None
    network_mode: str | None = None
    port_bindings: dict[str, list[PortBinding] | None] | None = None
    restart_policy: dict[str, Any] | None = None
    auto_remove: Any = None
    volume_driver: str | None = None
    volumes_from: list[str] | None = None
    mounts: list[Mount] | None = None
    console_size: Any = None
    annotations: dict[str, str] | None = None
    cap_add: list[str] | str | None = None
    cap_drop: Any = None
    capabilities: list[str] | None = None
    cgroupns_mode: str | None = None
    dns: Any = None
    dns_options: Any = None
    dns_search: Any = None
    extra_hosts: Any = None
    group_add: Any = None
    ipc_mode: str | None = None
    cgroup: str | None = None
    links: list[str] | None = None
    oom_score_adj: int | None = None
    pid_mode: str | None = None
    privileged: bool | None = None
    publish_all_ports: bool | None = None
    readonly_rootfs: Any = None
    security_opt: list[str] | None = None
    storage_opt: dict[str, str] | None = None
    tmpfs: dict[str, str] | None = None
    uts_mode: str | None = msgspec.field(default=None, name="UTSMode")
    userns_mode: str | None = None
    shm_size: Any = None
    sysctls: dict[str, str] | None = None
    runtime: str | None = None
    isolation: Any = None
    masked_paths: list[str] | None = None
    readonly_paths: list[str] | None = None


class Endpoint(_Body):
    ipam_config: Any = msgspec.field(default=None, name="IPAMConfig")
    links: list[str] | None = None
    aliases: Any = None
    mac_address: Any = None
    driver_opts: dict[str, str] | None = None
    gw_priority: Any = None
    network_id: str | None = msgspec.field(default=None, name="NetworkID")
    endpoint_id: Any = msgspec.field(default=None, name="EndpointID")
    gateway: Any = None
    ip_address: Any = msgspec.field(default=None, name="IPAddress")
    ip_prefix_len: Any = msgspec.field(default=None, name="IPPrefixLen")
    ipv6_gateway: Any = msgspec.field(default=None, name="IPv6Gateway")
    global_ipv6_address: Any = msgspec.field(default=None, name="GlobalIPv6Address")
    global_ipv6_prefix_len: Any = msgspec.field(default=None, name="GlobalIPv6PrefixLen")
    dns_names: Any = msgspec.field(default=None, name="DNSNames")


class NetworkingConfig(_Body):
    endpoints_config: dict[str, Endpoint | None] | None = None


class ContainerCreate(_Body):
    """`name` and `platform` belong into the query, `volumes_from` into HostConfig; dockerode sends them here, too."""

    name: Any = None
    platform: Any = None
    volumes_from: list[Any] | None = None
    hostname: Any = None
    domainname: Any = None
    user: str | None = None
    attach_stdin: Any = None
    attach_stdout: Any = None
    attach_stderr: Any = None
    exposed_ports: dict[str, Any] | None = None
    tty: Any = None
    open_stdin: Any = None
    stdin_once: Any = None
    env: Any = None
    cmd: Any = None
    healthcheck: dict[str, Any] | None = None
    args_escaped: Any = None
    image: str | None = None
    volumes: dict[str, Any] | None = None
    working_dir: Any = None
    entrypoint: Any = None
    network_disabled: Any = None
    mac_address: Any = None
    on_build: Any = None
    labels: dict[str, str] | None = None
    stop_signal: Any = None
    stop_timeout: Any = None
    shell: Any = None
    host_config: HostConfig | None = None
    networking_config: NetworkingConfig | None = None


class ContainerExec(_Body):
    user: str | None = None
    privileged: bool | None = None
    tty: Any = None
    attach_stdin: Any = None
    attach_stdout: Any = None
    attach_stderr: Any = None
    console_size: Any = None
    detach: Any = None
    detach_keys: Any = None
    env: Any = None
    working_dir: Any = None
    cmd: Any = None
    container: Any = None
    exec_id: Any = msgspec.field(default=None, name="execId")


class VolumeCreate(_Body):
    name: str | None = None
    driver: str | None = None
    driver_opts: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    cluster_volume_spec: Any = None


class IpamConfig(_Body):
    subnet: str | None = None
    ip_range: str | None = msgspec.field(default=None, name="IPRange")
    gateway: str | None = None
    auxiliary_addresses: dict[str, str] | None = None


class Ipam(_Body):
    driver: str | None = None
    options: dict[str, str] | None = None
    config: list[IpamConfig] | None = None


class NetworkCreate(_Body):
    name: str | None = None
    check_duplicate: Any = None
    driver: str | None = None
    scope: str | None = None
    internal: Any = None
    attachable: Any = None
    ingress: bool | None = None
    config_only: bool | None = None
    config_from: dict[str, Any] | None = None
    ipam: Ipam | None = msgspec.field(default=None, name="IPAM")
    enable_ipv4: Any = msgspec.field(default=None, name="EnableIPv4")
    enable_ipv6: Any = msgspec.field(default=None, name="EnableIPv6")
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class NetworkConnect(_Body):
    container: str | None = None
    endpoint_config: Endpoint | None = None


class NetworkDisconnect(_Body):
    container: str | None = None
    force: Any = None
