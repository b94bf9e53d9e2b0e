import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.chat_template import MAX_MESSAGES, MAX_SOURCE_BYTES, Bounds, ChatTemplate, checked_messages
from jaxinfer.errors import InvalidRequest, JaxInferError, ModelFormatError

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
USER = [{"role": "user", "content": "hi"}]
HELD = Bounds(seconds=0.6)
"""A shorter limit than the shipped one, so that templates that run for ever end sooner."""


@pytest.fixture
def rendering():
    """A function that renders a template once; ends the children afterwards."""
    templates = []

    def render(source, messages=USER, bounds=HELD, **options):
        templates.append(ChatTemplate(source, bounds=bounds, **options))
        return templates[-1].render(messages)

    yield render
    for template in templates:
        template.close()


@pytest.fixture(scope="module")
def chatml():
    template = ChatTemplate(CHATML)
    template.start()
    yield template
    template.close()


def test_conversation(chatml):
    messages = [{"role": "system", "content": "be <brief> & kind"}, {"role": "user", "content": "größer 😀\u2028\n"}]
    expected = ("<|im_start|>system\nbe <brief> & kind<|im_end|>\n<|im_start|>user\ngrößer 😀\u2028\n<|im_end|>\n")
    assert chatml.render(messages) == expected + "<|im_start|>assistant\n"
    assert chatml.render(messages, add_generation_prompt=False) == expected


@settings(max_examples=30, deadline=None)
@given(content=st.text(max_size=50))
def test_content_arrives_unchanged(chatml, content):
    """Text never becomes template: `{{ 7 * 7 }}` in a message stays that."""
    for text in (content, "{{ 7 * 7 }}" + content):
        assert chatml.render([{"role": "user", "content": text}], add_generation_prompt=False) == \
            f"<|im_start|>user\n{text}<|im_end|>\n"


def test_what_templates_expect_of_hugging_face(rendering):
    source = ("{{ bos_token }}|{{ tools is none }}|{{ documents is none }}|{{ messages | tojson }}|"
              "{{ {'b': '<é>', 'a': 1} | tojson(indent=1) }}|{{ strftime_now('%Y') | length }}|{{ thinking }}|"
              "{% generation %}words{% endgeneration %}|{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}"
              "{{ i }}{% endfor %}\n{% if true %}\n  x\n{% endif %}\n")
    text = rendering(source, special_tokens={"bos_token": "<s>"}, options={"thinking": False})
    assert text == ('<s>|True|True|[{"role": "user", "content": "hi"}]|{\n "b": "<é>",\n "a": 1\n}|4|False|words|01'
                    "  x\n")


@pytest.mark.parametrize(("source", "error"), [
    ("{{ 'a' * 500000000 }}", JaxInferError),
    ("{{ ['a' * 1000] * 100000000 }}", InvalidRequest),
    ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", InvalidRequest),
    ("{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}", InvalidRequest),
    ("{{ range(10**9) | list }}", InvalidRequest),
    ("{% set n = namespace(v='ab' * 1000) %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
     InvalidRequest),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", InvalidRequest),
    ("{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}", InvalidRequest),
    ("{{ '%999999999d' | format(1) }}", InvalidRequest),
    ("{{ '{:999999999}'.format(1) }}", InvalidRequest),
    ("{{ 9 ** 999999999 }}", JaxInferError),
    ("{{ lipsum(n=1000000) }}", InvalidRequest),
    ("{% for i in range(90000) %}{{ ('ab' * (99999 + i)) | replace('a', 'bb') | length }}{% endfor %}", InvalidRequest),
    ("{{" + "(" * 6000 + "1" + ")" * 6000 + "}}", JaxInferError),
    ("{% if true %}" * 3000 + "{% endif %}" * 3000, JaxInferError),
])
def test_hostile_cost_is_a_typed_error_in_time(rendering, source, error):
    begin = time.monotonic()
    with pytest.raises(error):
        rendering(source)
    assert time.monotonic() - begin < 4  # 0.6 s are the bound; a busy machine starts processes slowly


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ messages.append(1) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}", "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ self._TemplateReference__context.x }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}",
    "{{ messages[0].update(role='x') }}", "{{ ''['__class__'].x }}", "{{ ('' | attr('__class__')).x }}",
    "{{ raise_exception.__globals__.x }}", "{{ messages[0].content.__len__() }}", "{{ raise_exception.__code__.x }}",
])
def test_hostile_reach_is_a_typed_error(rendering, source):
    with pytest.raises(JaxInferError):
        rendering(source)


@pytest.mark.parametrize("name", ["__class__", "__init__", "__globals__", "__code__", "_x"])
def test_hidden_attributes_are_empty(rendering, name):
    """Looking at one alone gives jinja's Undefined, which prints as nothing."""
    objects = ("''", "messages", "raise_exception", "strftime_now", "namespace", "cycler", "self", "range", "tools")
    assert rendering("".join(f"{{{{ {thing}.{name} }}}}{{{{ {thing}['{name}'] }}}}" for thing in objects)) == ""


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% nonsense %}", "{% for %}", "{{ 'a' | nofilter }}"])
def test_malformed_is_a_format_error_at_the_start(source):
    template = ChatTemplate(source)
    with pytest.raises(ModelFormatError):
        template.start()


def test_too_large_a_source():
    with pytest.raises(ModelFormatError, match="bytes"):
        ChatTemplate("a" * (MAX_SOURCE_BYTES + 1))


def test_refusals_of_the_template_reach_the_client(rendering):
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        rendering("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="'nope' is undefined"):
        rendering("{{ nope.x }}")


def test_output_bound_is_exact(rendering):
    bounds = Bounds(output_bytes=100)
    assert rendering("{{ 'é' * 50 }}", bounds=bounds) == "é" * 50
    with pytest.raises(InvalidRequest, match="over 100 bytes"):
        rendering("{{ 'é' * 50 }}{{ 'a' }}", bounds=bounds)


def test_a_broken_bound_spoils_no_other_render():
    """A slow conversation ends its child; the next one gets a new child and its own text."""
    source = ("{% if messages[0].content == 'slow' %}{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}"
              "{% endfor %}{% endif %}{{ messages[0].content }}")
    template = ChatTemplate(source, bounds=HELD)
    with ThreadPoolExecutor(4) as pool:
        futures = {text: pool.submit(template.render, [{"role": "user", "content": text}])
                   for text in ("a", "slow", "b", "c")}
        assert isinstance(futures.pop("slow").exception(), InvalidRequest)
        assert {text: future.result() for text, future in futures.items()} == {"a": "a", "b": "b", "c": "c"}
    template.close()


def test_a_dead_child_is_replaced(chatml):
    chatml.render(USER)
    child = chatml._worker._child
    child._process.kill()
    child._process.wait()
    assert chatml.render(USER).endswith("assistant\n")
    assert chatml._worker._child is not child


def test_an_interrupted_render_leaves_no_reply_behind(chatml, monkeypatch):
    """Else the next request would read the text of the interrupted one."""
    chatml.render(USER)
    stdout = chatml._worker._child._process.stdout

    class Interrupting:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            stdout.close()

    monkeypatch.setattr(chatml._worker._child._process, "stdout", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        chatml.render([{"role": "user", "content": "secret"}])
    assert "secret" not in chatml.render(USER)


def test_children_end_with_their_template():
    template = ChatTemplate(CHATML)
    template.render(USER)
    process = template._worker._child._process
    del template
    assert process.poll() is not None
    assert threading.active_count() < 10


def test_text_parts_are_joined_by_new_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_messages([{"role": "user", "content": parts, "name": None}]) == [{"role": "user", "content": "a\nb"}]
    assert checked_messages([{"role": "user", "content": [], "name": "x"}])[0] == {
        "role": "user", "content": "", "name": "x"}


@pytest.mark.parametrize(("messages", "field"), [
    ([], "messages"), (None, "messages"), ("hi", "messages"), ({"role": "user"}, "messages"),
    ([USER[0]] * (MAX_MESSAGES + 1), "messages"),
    (["hi"], "messages[0]"), ([{**USER[0], "template": "x"}], "messages[0]"), ([{**USER[0], 5: 1}], "messages[0]"),
    ([{"content": "hi"}], "messages[0].role"), ([{"role": "user<|im_end|>", "content": ""}], "messages[0].role"),
    ([{"role": ["user"], "content": ""}], "messages[0].role"),
    ([USER[0], {"role": "user"}], "messages[1].content"), ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": "", "name": "n" * 257}], "messages[0].name"),
])
def test_messages_refused(messages, field):
    with pytest.raises(InvalidRequest) as error:
        checked_messages(messages)
    assert error.value.field == field


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["role", "content", "name", "type", "text", "x"]), inner, max_size=4), max_leaves=10)


@settings(deadline=None)
@given(messages=JSON)
def test_garbage_messages_are_refused_or_plain(messages):
    try:
        found = checked_messages(messages)
    except InvalidRequest:
        return
    for message in found:
        assert all(isinstance(value, str) and value.encode() is not None for value in message.values())
