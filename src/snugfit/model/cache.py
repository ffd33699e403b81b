"""What takes the place of transformers' cache when a layer runs over whole rows: nothing kept, nothing from before."""

from __future__ import annotations

from torch import Tensor


class NoCache:
    """Answers all that attention, linear attention and convolutions ask of a cache; passes on what they give it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as attention reads them back: as they are."""
        return key_states, value_states

    def get_seq_length(self, *_args: object) -> int:
        """Tokens seen before: none."""
        return 0

    def has_previous_state(self, *_args: object) -> bool:
        """No states from before."""
        return False

    def get_conv_state(self, *_args: object, **_kwargs: object) -> None:
        """No state from before."""
        return

    get_recurrent_state = get_conv_state

    def update_conv_state(self, states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        """The given states."""
        return states

    update_recurrent_state = update_conv_state
