"""What people enter in the Studio. Each form's `request` is what the operation of its name is called with."""

from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from ai_ops import prompts, providers
from ai_ops.requests import (
    ChatRequest,
    ContinuationRequest,
    DraftRequest,
    ImagePromptRequest,
    ImageRequest,
    RefinementRequest,
    RepurposeRequest,
    SelectionRequest,
    ShownPrice,
)
from billing import catalogue
from billing.catalogue import CatalogueError, system_settings
from billing.forms import KeyField
from billing.models import ModelPrice

MAX_TEXT_CHARACTERS = 100_000
MAX_IMAGES = 4
NO_MODEL = "No model is on offer right now. Please try again later."
IMAGE_SIZES = (
    ("1024x1024", "Square, 1024 × 1024"),
    ("1536x1024", "Landscape, 1536 × 1024"),
    ("1024x1536", "Portrait, 1024 × 1536"),
)


def _model_choices(kind: str) -> list[tuple[str, str]]:
    return [
        (f"{price.provider}:{price.model}", f"{price.display_name} ({price.get_provider_display()})")
        for price in catalogue.list_active_models(kind)
        if providers.is_configured(price.provider)
    ]


def _text_models() -> list[tuple[str, str]]:
    return _model_choices(ModelPrice.Kind.TEXT)


def _image_models() -> list[tuple[str, str]]:
    return _model_choices(ModelPrice.Kind.IMAGE)


class ModelSelect(forms.Select):
    def optgroups(self, *args: Any, **kwargs: Any) -> list[Any]:
        """A list without a model says so."""
        return super().optgroups(*args, **kwargs) or [(None, [self.create_option("model", "", NO_MODEL, True, 0)], 0)]


class ModelField(forms.ChoiceField):
    """A model on sale. For another one the catalogue says why not: a retired one names its replacement."""

    widget = ModelSelect
    default_error_messages = {"required": "Choose a model."}

    def validate(self, value: str) -> None:
        provider, _, model = value.partition(":")
        if value and not self.valid_value(value) and "\0" not in value:
            try:
                catalogue.get_active_model(provider=provider, model=model)
            except CatalogueError as error:
                raise ValidationError(error.message, code="invalid_choice") from None
        super().validate(value)


def _project_field() -> forms.CharField:
    return forms.CharField(max_length=150, initial="My first project")


def _wishes_field(label: str) -> forms.CharField:
    return forms.CharField(max_length=1_000, required=False, label=label, widget=forms.Textarea(attrs={"rows": 2}))


class OperationForm(forms.Form):
    """A form that pays for an operation. While it is being filled in, it asks for a quote with what it has."""

    # What may be missing from a quote: it does not change the price.
    unpriced: tuple[str, ...] = ()

    @classmethod
    def for_quote(cls, data: Any) -> "OperationForm":
        form = cls(data)
        for name in cls.unpriced:
            form.fields[name].required = False
        return form

    @property
    def request(self) -> Any:
        """What the person asks for. The form must be valid."""
        raise NotImplementedError

    def _fields(self, *names: str) -> dict[str, Any]:
        """The named fields, and the model as its provider and its name."""
        provider, _, model = self.cleaned_data["model"].partition(":")
        return {name: self.cleaned_data[name] for name in names} | {"provider": provider, "model": model}


class DraftForm(OperationForm):
    unpriced = ("title", "topic", "project")

    title = forms.CharField(max_length=200, widget=forms.TextInput(attrs={"autocomplete": "off"}))
    topic = forms.CharField(
        max_length=20_000,
        label="What it is about",
        widget=forms.Textarea(attrs={"rows": 6}),
        help_text="Facts, audience, what must not be missing.",
    )
    project = _project_field()
    model = ModelField(choices=_text_models)
    tone = forms.ChoiceField(choices=list(prompts.TONES.items()))
    length = forms.ChoiceField(
        choices=[(key, length.label) for key, length in prompts.LENGTHS.items()], initial="medium"
    )

    @property
    def request(self) -> DraftRequest:
        return DraftRequest(**self._fields("title", "topic", "project", "tone", "length"))


class ContinuationForm(OperationForm):
    content_id = forms.IntegerField(min_value=1, widget=forms.HiddenInput)
    model = ModelField(choices=_text_models)

    @property
    def request(self) -> ContinuationRequest:
        return ContinuationRequest(**self._fields("content_id"))


class ChatForm(OperationForm):
    unpriced = ("question", "project")

    chat_id = forms.IntegerField(min_value=1, required=False, widget=forms.HiddenInput)
    question = forms.CharField(
        max_length=20_000, label="Your message", widget=forms.Textarea(attrs={"rows": 3, "autocomplete": "off"})
    )
    model = ModelField(choices=_text_models)
    project = _project_field()

    @property
    def request(self) -> ChatRequest:
        return ChatRequest(**self._fields("chat_id", "question", "project"))


class TextField(forms.CharField):
    """The text of a piece, with the line ends that the database and the offsets of a selection know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=MAX_TEXT_CHARACTERS, strip=False, **options)

    def to_python(self, value: Any) -> str:
        return str(super().to_python(value)).replace("\r\n", "\n").replace("\r", "\n")


class EditForm(forms.Form):
    """The text as its author typed it, over the version they had before them."""

    body = TextField(label="Text", widget=forms.Textarea(attrs={"rows": 18}))
    base_number = forms.IntegerField(min_value=0, widget=forms.HiddenInput)


class _RevisionForm(OperationForm):
    """About the text that stands in the editor, which may not have been saved."""

    content_id = forms.IntegerField(min_value=1, widget=forms.HiddenInput)
    base_number = forms.IntegerField(min_value=0, widget=forms.HiddenInput)
    body = TextField(widget=forms.HiddenInput)
    model = ModelField(choices=_text_models)


class RefinementForm(_RevisionForm):
    refinement = forms.ChoiceField(
        label="What to do", choices=[(key, choice.label) for key, choice in prompts.REFINEMENTS.items()]
    )
    wishes = _wishes_field("Anything else")

    @property
    def request(self) -> RefinementRequest:
        return RefinementRequest(**self._fields("content_id", "base_number", "body", "refinement", "wishes"))


class SelectionForm(_RevisionForm):
    unpriced = ("instruction",)

    selection = TextField(
        label="Passage",
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text="Select it in the text, or paste it here exactly as it stands there.",
    )
    start = forms.IntegerField(min_value=0, required=False, widget=forms.HiddenInput)
    instruction = forms.CharField(max_length=1_000, label="What to change", widget=forms.Textarea(attrs={"rows": 2}))

    @property
    def request(self) -> SelectionRequest:
        return SelectionRequest(
            **self._fields("content_id", "base_number", "body", "selection", "start", "instruction")
        )


class RepurposeForm(OperationForm):
    content_id = forms.IntegerField(min_value=1, widget=forms.HiddenInput)
    transformation = forms.ChoiceField(
        label="Turn it into", choices=[(key, choice.label) for key, choice in prompts.TRANSFORMATIONS.items()]
    )
    wishes = _wishes_field("Anything else")
    model = ModelField(choices=_text_models)

    @property
    def request(self) -> RepurposeRequest:
        return RepurposeRequest(**self._fields("content_id", "transformation", "wishes"))


_STYLES = [(key, choice.label) for key, choice in prompts.IMAGE_STYLES.items()]


class ImagePromptForm(OperationForm):
    unpriced = ("idea", "project")

    idea = forms.CharField(
        max_length=2_000,
        label="Your idea",
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text="A few words are enough: a model turns them into a full description.",
    )
    style = forms.ChoiceField(choices=_STYLES, required=False)
    project = _project_field()
    model = ModelField(choices=_text_models)

    @property
    def request(self) -> ImagePromptRequest:
        return ImagePromptRequest(**self._fields("idea", "style", "project"))


class ImageForm(OperationForm):
    unpriced = ("prompt", "project")

    prompt = forms.CharField(max_length=4_000, label="What to show", widget=forms.Textarea(attrs={"rows": 5}))
    model = ModelField(choices=_image_models)
    size = forms.ChoiceField(choices=IMAGE_SIZES)
    quality = forms.ChoiceField(
        choices=[("low", "Low"), ("medium", "Medium"), ("high", "High")],
        initial="medium",
        required=False,
        help_text="Google's models have one quality.",
    )
    count = forms.TypedChoiceField(
        label="How many", coerce=int, choices=[(number, str(number)) for number in range(1, MAX_IMAGES + 1)]
    )
    style = forms.ChoiceField(choices=_STYLES, required=False)
    project = _project_field()

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        provider, _, model = data.get("model", "").partition(":")
        if not model or "size" not in data:
            return data
        price = catalogue.get_active_model(provider=provider, model=model)
        options = catalogue.image_options(price, system_settings.get_system_settings())
        qualities = [option.quality for option in options if option.size == data["size"]]
        if not qualities:
            self.add_error("size", f"{price.display_name} does not make images of this size. Choose another one.")
        elif data.get("quality") not in qualities:
            # A model without qualities makes them all alike; any other needs one.
            if "" in qualities:
                data["quality"] = ""
            else:
                self.add_error("quality", f"{price.display_name} does not know this quality. Choose another one.")
        return data

    @property
    def request(self) -> ImageRequest:
        return ImageRequest(**self._fields("prompt", "style", "project", "size", "quality", "count"))


class SendingForm(forms.Form):
    """What stands beside an operation's form when it is sent: the key of this one sending, and the price that its
    quote showed. Without scripts there is no quote."""

    idempotency_key = KeyField()
    quoted_unit = forms.CharField(max_length=200, required=False)
    quoted_price = forms.DecimalField(min_value=0, max_digits=20, required=False)

    @property
    def shown_price(self) -> ShownPrice | None:
        unit, price = self.cleaned_data["quoted_unit"], self.cleaned_data["quoted_price"]
        return None if price is None else ShownPrice(unit, price)
