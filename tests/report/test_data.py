"""Tables by layer: short on a terminal, whatever the model's depth."""

from kvweave.report.data import Answer, Layer, Speed, cells_of


def layer(index: int, kept: int, flow: float | None = None) -> Layer:
    return Layer(index, "full", True, 400, kept, 0, 400 - kept, kept * 512, 400 * 512, flow, None)


def sliding(index: int) -> Layer:
    return Layer(index, "sliding_attention", False)


def answer(layers: list[Layer]) -> Answer:
    return Answer("snapkv:budget=0.2", "snapkv", "", 1, Speed(None, 0.0, 0, 1), 1, 1, layers)


def test_few_rows_stay_one_by_one() -> None:
    shown = answer([layer(0, 80), layer(1, 80), layer(2, 90)]).bands(8)
    assert [(place, cells_of(layers)["kept"]) for place, layers in shown] == [("0-1", "80"), ("2", "90")]


def test_many_layers_come_as_bands_that_hold_each_once() -> None:
    layers = [layer(n, 60 + 7 * n % 40, n / 100) for n in range(30)]
    shown = answer(layers).bands(8)
    assert 4 <= len(shown) <= 8
    assert [one for _, band in shown for one in band] == layers
    place, band = shown[0]
    assert place == "0-3"
    cells = cells_of(band)
    assert cells["kept"] == "60-81"
    assert cells["flow"] == "0.00-0.03"
    assert cells["size"] == "30.0-40.5 KiB"
    assert cells["merged"] == "0"


def test_layers_that_are_not_compressed_stand_together() -> None:
    layers = [sliding(n) if n % 3 else layer(n, 60 + n) for n in range(30)]
    shown = answer(layers).bands(5)
    kinds = [(place, band[0].compressed) for place, band in shown]
    assert kinds == [
        ("0, 3", True),
        ("1-2, 4-5, 7-8, 10-11, 13-14, 16-17, 19-20, 22-23, 25-26, 28-29", False),
        ("6, 9", True),
        ("12, 15", True),
        ("18, 21", True),
        ("24, 27", True),
    ]


def test_sizes_of_several_units() -> None:
    assert cells_of([layer(0, 1), layer(1, 390)])["size"] == "512 B-195 KiB"
