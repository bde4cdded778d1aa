"""What travels between processes arrives as it was sent."""

import torch

from cospadi.jobs.carry import ALIGNMENT, pack, unpack


def test_tensors_travel_with_their_strides_and_alignment() -> None:
    memory = torch.arange(100, dtype=torch.float32)
    tensors = [
        torch.randn(7, 9).T[1:],
        memory[3:].view(torch.int32),
        torch.randn(12).bfloat16()[1::2],
        torch.ones(1, dtype=torch.float64).expand(4, 5),
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64).conj(),
    ]
    parcel = pack({"tensors": tensors, "parameter": torch.nn.Parameter(torch.ones(2))})
    assert sum(part.nbytes for part in parcel.parts) < 1000  # of a view only what it spans
    value = unpack(parcel)
    assert isinstance(value["parameter"], torch.nn.Parameter)
    for sent, received in zip(tensors, value["tensors"], strict=True):
        assert torch.equal(sent, received)
        assert (sent.dtype, sent.stride()) == (received.dtype, received.stride())
        assert (received.data_ptr() - sent.data_ptr()) % ALIGNMENT == 0 or sent.is_conj()
    value["tensors"][0].zero_()  # memory of its own
    assert tensors[0].any()


def test_what_becomes_of_a_tensor_after_it_is_packed_is_not_seen() -> None:
    tensor = torch.ones(3)
    parcel = pack(tensor)
    tensor.zero_()
    assert unpack(parcel).tolist() == [1, 1, 1]
