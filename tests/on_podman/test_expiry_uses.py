"""On Podman a followed log is opened in a task of its own, and is a use of its container all the same."""

from minded import TTL_S, Minded, folder, minded
from test_expiry_uses import followed


def test_while_a_log_is_followed_it_is_a_use(minded: Minded) -> None:
    # It has said something: so Podman's answer begins, with which the task ends that opened it.
    box, witness = minded.make(cmd=["sh", "-c", "echo said; exec sleep 1d"]), minded.make()
    with followed(minded, box):
        minded.forward(5 * TTL_S)
        minded.wait_gone(witness)
        assert minded.is_running(box)
    minded.age(box)
