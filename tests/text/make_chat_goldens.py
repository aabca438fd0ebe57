"""Makes chat-goldens.json: what transformers renders for our templates, conversations and one-line snippets.

    python -m venv venv && venv/bin/pip install -r tests/text/requirements.txt
    venv/bin/python tests/text/make_chat_goldens.py default-model.gguf

The templates in templates/ are self-written and use what published families' templates use. The default model's own
template is read from its file and not committed. The clock stands at NOW.
"""

import datetime
import itertools
import json
import pathlib
import sys

from gguf import GGUFReader
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent
GOLDENS = HERE.parents[1] / "crates" / "engine" / "tests" / "text"
NOW = datetime.datetime(2024, 3, 5, 7, 8, 9, 12345)


class FrozenTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = FrozenTime

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a \"place\" <b>now</b> & later: it's \u2600\ufe0f or \u96e8",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["M\u00fcnchen", "\u6771\u4eac", "a\\b\n\t\u0001\u007f"]},
                    "days": {"type": "integer", "minimum": 0, "default": 1.0, "maximum": 1e20, "multipleOf": 0.00001},
                    "exact": {"type": "boolean", "default": None, "examples": [True, False, [], {}, -7, 2.5, 1e-7]},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "noop", "parameters": {}}},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "\u6771\u4eac", "days": 2}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi there!"}],
    "system": [
        {"role": "system", "content": "  You are\nterse.  "},
        {"role": "user", "content": " What is 2+2? "},
        {"role": "assistant", "content": " 4\n"},
        {"role": "user", "content": "And <b>'3' & \"3\"</b>?"},
    ],
    "unicode": [
        {"role": "user", "content": "na\u00efve \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 {{ x }} {% if %}"},
        {"role": "assistant", "content": "\u2603\u0000\u001f\u2028 <|im_end|>"},
        {"role": "user", "content": ""},
    ],
    "tools": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "{\"sky\": \"\u2600\"}", "tool_call_id": "c1", "name": "get_weather"},
        {"role": "tool", "content": "again", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
    ],
    "two-calls": [
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    ],
    "thought": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "\nI am\n"},
    ],
    "reasoning": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "r"}],
    "disorder": [{"role": "assistant", "content": "me first"}, {"role": "user", "content": "no"}],
    "stranger": [{"role": "narrator", "content": "Once upon a time"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " look: "}, {"type": "image"}, {"type": "text", "text": "\u00e9"}]},
        {"role": "assistant", "content": "nice"},
    ],
}

# Each prints what Jinja2 in Python makes of one thing. They see messages (the "tools" conversation), tools and data.
SNIPPETS = r"""
{{ [1, 2.0, 'a', none, true, {'k': [1]}, 1.5e10, -0.0] }}
{{ {'a': 'it\'s', 'b': "say \"x\"", 'c': 'é\n\t☃'} }}
{{ none }}|{{ true }}|{{ false }}|{{ 1 }}|{{ 1.0 }}|{{ undefined_thing }}|{{ 'x' }}
{{ 'none: ' ~ none ~ ' ' ~ true ~ ' ' ~ 2.50 ~ ' ' ~ [1, 'b'] ~ ' ' ~ {} }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 6 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1 + 1.5 }}
{{ 'a' * 3 }} {{ [1] * 2 }} {{ [1] + [2] }} {{ 'a' + 'b' }} {{ 1 == 1.0 }} {{ '1' == 1 }} {{ true == 1 }}
{{ 'abc'[0] }} {{ 'abc'[-1] }} {{ 'abcdef'[1:4] }} {{ 'abcdef'[::-1] }} {{ 'abcdef'[::2] }} {{ [1,2,3][-2:] }} {{ 'é☃x'[1:] }}
{{ 'b' in 'abc' }} {{ 2 in [1,2] }} {{ 'k' in {'k': 1} }} {{ 'z' not in 'abc' }}
{{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ not true or true and false }}
{{ 'yes' if data.n > 3 else 'no' }} {{ 'shown' if false }}|{{ (1 if true) }}
{{ ' x y '.strip() }}|{{ '--x--'.strip('-') }}|{{ ' x '.lstrip() }}|{{ ' x '.rstrip() }}|{{ '\n a \t'.strip() }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a,b,c'.split(',', 1) }} {{ 'a b c'.rsplit(' ', 1) if false else 'skip' }}
{{ 'a,b'.split(',')[1] }} {{ 'x</t>y'.split('</t>')[-1].lstrip('\n') }} {{ 'ab\ncd\r\nef'.splitlines() }}
{{ 'Hello'.startswith('He') }} {{ 'Hello'.endswith(('x', 'lo')) }} {{ 'hello world'.title() }} {{ 'hELLO wORLD'.capitalize() }}
{{ 'straße'.upper() }} {{ 'ÀÉ'.lower() }} {{ "they're bill's".title() }} {{ "it's a dog_cat x-y 3rd" | title }}
{{ 'aXbX'.replace('X', '-') }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'abc' | replace('b', 'BB') }}
{{ 'banana'.count('an') }} {{ 'banana'.find('n') }} {{ 'banana'.rfind('n') }} {{ 'banana'.find('z') }} {{ 'banana'.index('n') }}
{{ '-'.join(['a', 'b']) }} {{ ['a', 'b'] | join('-') }} {{ [1, 2] | join }} {{ data.people | map(attribute='name') | join(', ') }}
{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }}
{{ '7'.zfill(3) }} {{ '-7'.zfill(4) }} {{ 'a'.ljust(3) }}| {{ 'a'.rjust(3, '.') }} {{ 'aB'.swapcase() }} {{ 'ß'.casefold() if false else 'skip' }}
{{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ 'AB'.isupper() }} {{ 'ab'.islower() }} {{ ' '.isspace() }} {{ ''.isdigit() }}
{{ '{} and {}'.format(1, 'x') }} {{ '%s' | format('z') }} {{ '{a}'.format(a=2) }} {{ '%05.2f|%d' | format(3.14159, 42) }}
{{ data.dict.items() | list }} {{ data.dict.keys() | list }} {{ data.dict.values() | list }} {{ data.dict.get('z', 'dflt') }} {{ data.dict.get('zz') }}
{% for k, v in data.dict.items() %}{{ k }}={{ v }};{% endfor %}{% for k in data.dict %}{{ k }},{% endfor %}
{% for k, v in data.dict | items %}{{ k }}={{ v }};{% endfor %}{{ data.dict | dictsort }}{{ data.dict | length }}
{{ x is defined }} {{ data is defined }} {{ data.nope is defined }} {{ data.nope is undefined }} {{ none is none }} {{ data.n is not none }}
{{ data is mapping }} {{ [] is mapping }} {{ 'a' is string }} {{ [] is sequence }} {{ 'a' is sequence }} {{ {} is iterable }} {{ 1 is number }} {{ 'a' is iterable }}
{{ 1 is integer }} {{ 1.0 is float }} {{ true is boolean }} {{ true is number }} {{ 4 is even }} {{ 3 is odd }} {{ 6 is divisibleby 3 }} {{ 1 is true }} {{ true is true }} {{ false is false }}
{{ 'a' is eq 'a' }} {{ 'a' is in ['a'] }} {{ 'A' is upper }} {{ 'a' is lower }} {{ none is sameas none }} {{ 1 is callable }} {{ raise_exception is callable }}
{{ data.people | selectattr('age', 'gt', 30) | map(attribute='name') | list }} {{ data.people | rejectattr('age', 'equalto', 31) | list | length }}
{{ data.people | selectattr('admin') | list | length }} {{ data.people | selectattr('name', 'in', ['Ann']) | first }} {{ data.people | selectattr('admin', 'defined') | list | length }}
{{ [3, 1, 2] | sort }} {{ [3, 1, 2] | sort(reverse=true) }} {{ ['b', 'A'] | sort }} {{ data.people | sort(attribute='age') | map(attribute='age') | list }}
{{ [1, 1, 2] | unique | list }} {{ [1, 2, 3] | sum }} {{ [1, 2, 3] | first }} {{ [1, 2, 3] | last }} {{ [3, 1] | min }} {{ [3, 1] | max }} {{ [1, 2, 3] | reverse | list }} {{ 'abc' | reverse }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }} {{ [1, 2, 3] | slice(2) | list }} {{ range(3) | list }} {{ range(1, 10, 3) | list }} {{ [[1, 2], [3]] | map('length') | list }}
{{ ['a', 'b'] | map('upper') | join }} {{ [0, 1, '', 'x', none] | select | list }} {{ [1, 2, 3] | select('odd') | list }} {{ [1, 2] | reject('odd') | list }}
{{ 'abc' | length }} {{ 'abc' | upper }} {{ ' a ' | trim }}| {{ 'é' | length }} {{ data.people | length }} {{ '👨‍👩‍👧' | length }} {{ 'aXbX' | lower | list }}
{{ nope | default('d') }} {{ '' | default('d') }}| {{ '' | default('d', true) }} {{ none | default('d') }} {{ false | default('x', boolean=true) }} {{ nope | d }}
{{ '3' | int }} {{ 'x' | int }} {{ 'x' | int(5) }} {{ 3.9 | int }} {{ '3.5' | float }} {{ 3 | float }} {{ 3 | string }} {{ 2.567 | round(2) }} {{ 2.5 | round }} {{ -3 | abs }}
{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\nb' | indent(width=4, first=true) }}
{{ 'a b' | capitalize }} {{ 'hello world foo' | truncate(11) }} {{ 'one two' | wordcount }} {{ '<a>' | escape }} {{ '<a>' | e }} {{ '<b>' | safe }} {{ '<p>x</p>' | striptags }}
{{ data | tojson }}
{{ data | tojson(indent=2) }}
{{ data.dict | tojson(sort_keys=true) }} {{ data.dict | tojson(separators=(',', ':')) }} {{ 'é☃\u007f😀' | tojson(ensure_ascii=true) }} {{ 'é' | tojson(true) }}
{{ [1, [], {}, [[]], {'a': {}}] | tojson(indent=1) }} {{ [] | tojson(indent=4) }} {{ [1, 2] | tojson(indent='--') }} {{ [1] | tojson(indent=0) }}
{{ '<script>&\'"</script>' | tojson }} {{ {'a': none, 'b': true, 'c': 1.0, 'd': 1e16, 'e': 1e15, 'f': 0.0001, 'g': 0.00001, 'h': 123456789.125} | tojson }}
{{ 12345678901234567890 | tojson }} {{ -9223372036854775808 | tojson }} {{ (1, 'a') | tojson }} {{ {1: 'x', true: 'y'} | tojson if false else 'skip' }}
{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ strftime_now('%d %B %Y') }} {{ strftime_now('%A %a %b %j %p %I %y %%') }} {{ strftime_now('%-d/%-m %e %f') }}
{{ strftime_now('%c|%x|%X|%D|%T|%R|%F|%u|%w|%U|%W|%V|%G|%C|%h|%n|%t|%k|%l|%r|%P|%Z|%z') }} {{ strftime_now('%^a %^B %_d %-I %-H %Q x%') }} {{ strftime_now('plain é') }}
{% set ns = namespace(a=1, b='x') %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }} {{ ns.b }}
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }} {% if true %}{% set x = 3 %}{% endif %}{{ x }}
{% set a, b = 1, 'two' %}{{ a }} {{ b }} {% set c = [] %}{{ c }} {% set block %}in {{ a }}{% endset %}{{ block }}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %} {% for i in [1, 2, 3] if i > 1 %}{{ loop.index }}/{{ loop.length }}:{{ i }} {% endfor %}
{% for i in ['a', 'b', 'c'] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.cycle('x', 'y') }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.depth }} {% endfor %}
{% for p in data.tree recursive %}{{ p.v }}{% if p.kids %}({{ loop(p.kids) }}){% endif %}{% endfor %} {% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}
{% macro m(a, b='d', c=none) %}[{{ a }},{{ b }},{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(1, c=3) }}{{ m('x') | upper }} {{ m(1) ~ '!' }}
{% macro outer() %}<{{ caller() }}>{% endmacro %}{% call outer() %}body{% endcall %} {% filter upper %}loud{% endfilter %}
{% macro va(x) %}{{ x }} {{ varargs }} {{ kwargs }}{% endmacro %}{{ va(1) if false else 'skip' }}
{% with a=1, b=2 %}{{ a + b }}{% endwith %} {% raw %}{{ raw }}{% endraw %} {# comment #}after
a {%- if true -%} b {%- endif -%} c {%+ if true %} d {% endif +%} e
{{ messages | length }} {{ messages[-1].content }} {{ messages[1:3] | map(attribute='role') | list }} {{ messages | map(attribute='content') | select('string') | join('|') }}
{{ messages[2].tool_calls[0]['function'].arguments | tojson }} {{ messages[2]['content'] is none }} {{ messages[0].nope is defined }} {{ messages[2].tool_calls is sequence }}
{{ messages | selectattr('role', 'equalto', 'tool') | list | length }} {{ (messages | last).role }} {{ messages[::-1][0].role }} {{ messages | rejectattr('content', 'none') | list | length }}
{{ data['n'] }} {{ data.get('n') }} {{ data.dict['a'] }} {{ data.people[0].name }} {{ data.people[0]['nope'] }}| {{ data['no' ~ 'pe'] }}|
{{ dict(a=1, b='x') }} {{ dict([('k', 'v')]) if false else 'skip' }} {{ dict(data.dict, z=1) }} {{ {'a': 1}.items() | list }}
{{ [1, 2] is iterable and [1, 2] is not string and [1, 2] is not mapping }} {{ (1, 2) }} {{ (1,) }} {{ () }}
{{ 'x' if messages is defined and messages[0]['role'] == 'system' else 'y' }} {{ not messages }} {{ messages and 'truthy' }} {{ '' or 'fallback' }} {{ none or 0 }}
{{ "a" "b" }} {{ 'tab\tnl\\n' }} {{ "\u00e9\x41" }} {{ 1_000 }} {{ 0x1f if false else 'skip' }}
{{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ [1, 2] == [1, 2] }} {{ {'a': 1} == {'a': 1} }} {{ 'é' > 'z' }}
{{ data.people | map(attribute='nope', default='-') | list }} {{ data.people | groupby('admin') | length }} {{ data.people | map('tojson') | first }}
{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b
{{ 'ab' | center(6) }}|
{{ 5 | pprint }} {{ data.n | string | length }} {{ data.f }} {{ data.big }} {{ data.e }} {{ 1e16 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 1e15 }} {{ 100000000000000000000 }}
{{ [1.5, 0.25, 1e10] }} {{ 1.5 ~ '' }} {{ 'a' ~ 1e10 }} {{ 3.0 | string }} {{ 10 / 4 }} {{ 10 / 5 }} {{ 1e10 | int }}
{{ "é" | tojson }} {{ 'x' | attr('y') is defined }} {{ data.items() | list | length }}
{{ data.dict.pop('a') }}
{{ data.people.append(1) }}
{{ nope.attr }}
{{ nope() }}
{{ 'a' + 1 }}
{{ 'a' + none }}
{{ none + 'a' }}
{{ nope + 'a' }}
{{ 'a' + nope }}
{{ none.x }}|{{ none['x'] }}|{{ 1 .x }}|{{ 'abc'.x }}|{{ [1][5] }}|{{ 'abc'[7] }}
{{ nope[0] }}
{% for x in nope %}{{ x }}{% else %}none{% endfor %} {{ 'x' in nope }} {{ nope == none }} {{ nope | length }} {{ nope | list }} {{ nope | join }}|
{{ none | length }}
{{ 1 | length }}
{{ 'x' | nofilter }}
{{ 'x' is notest }}
{{ raise_exception('Stop: ' ~ messages[0].role ~ ' "é" {}') }}
{{ [1, 2, 3] | tojson(indent=-1) }}
{{ data | tojson | length }} {{ nope | tojson }}
{{ range(100001) | length }}
{{ 1 // 0 }}
{{ 'a'.nomethod() }}
{% include 'other' %}
{% extends 'other' %}
{{ '%s %s' % ('a',) }}
{% set messages = [] %}{{ messages | length }}
{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ pad_token is defined }}{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}
{{ namespace(x=1).x }} {% set n = namespace() %}{{ n.y is defined }} {% set n.y = [] %}{{ n.y }} {% set n.d = {'a': 1} %}{{ n.d.a }}
{{ ''.__class__ }}|{{ [].__len__ }}
{{ range is defined }} {{ dict is defined }} {{ cycler is defined }} {{ namespace is defined }}
{% do 1 %}
{% if messages[0].role == 'system' %}{% set sys %}{{ messages[0].content }}{% endset %}{% endif %}{{ sys is string }} {{ sys ~ '.' }} {{ sys | length }}
{{ '  a\n  b  ' | trim | indent(1) }} {{ '%%' }} {{ "{{" }} {{ '}}' }} {{ '{%' }}
{{- '  kept  ' -}}   joined
{{ 3 | string ~ 'x' }} {{ 'a' | upper ~ 'b' | upper }} {{ -1 | abs }} {{ not 'a' in 'abc' }} {{ 2 + 3 * 4 ** 2 % 5 }} {{ 'a' ~ (1 + 2) }} {{ 1 ~ 2 * 3 }}
{{ messages[0].content[:5] ~ '...' }} {{ messages[0]['content'].split(' ')[0] | lower }} {{ messages | map(attribute='role') | unique | join(',') }} {{ messages[1].content.split('e')[0:1] }}
{{ ([1] + [2])[0] }} {{ ([1] + [2])[-1] }} {{ ([1] + [2])[1:] }} {{ ([1] + [2]) | length }} {{ 1 in [1] + [2] }} {{ [1] + [2] == [1, 2] }} {{ ([1] + [2]) | tojson }} {{ ([1] + [2]) is iterable }}
{{ nope is sequence }} {{ nope is iterable }} {{ nope is mapping }} {{ nope is string }} {{ none is iterable }} {{ none is sequence }} {{ 5 is iterable }}
{{ None is none }} {{ True }} {{ False }} {{ None }} {{ messages[0].role != None }} {{ [True, None] }} {{ True is sameas true }}
{{ messages[0].get('tool_calls', []) }} {{ messages[2].get('tool_calls') | length }} {{ 'role' in messages[0] }} {{ 'nope' in messages[0] }} {{ messages[0].get('x') is none }}
{% set ns = namespace(multi=true, last=messages | length - 1) %}{% for m in messages[::-1] %}{% set index = messages | length - 1 - loop.index0 %}{% if ns.multi and m.role == 'user' and m.content is string and not (m.content.startswith('<r>') and m.content.endswith('</r>')) %}{% set ns.multi = false %}{% set ns.last = index %}{% endif %}{% endfor %}{{ ns.last }} {{ ns.multi }}
{% set ns = namespace(list=[], text='', d={}) %}{% for m in messages %}{% set ns.list = ns.list + [m.role] %}{% set ns.text = ns.text ~ m.role[0] %}{% endfor %}{{ ns.list }} {{ ns.text }} {{ ns.d }}
{% for m in messages[:-1] %}{% if not loop.last and messages[loop.index].role == 'tool' %}{{ m.role }}>{% endif %}{% endfor %} {% for m in messages if m.role == 'tool' %}{{ m.name is defined }}{{ loop.last }}{% endfor %}
{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}={% endif %}{% if loop.nextitem is not defined %}.{% endif %}{% endfor %}
{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }} {{ tools[0].function.parameters.properties | list }} {{ tools[1] | tojson }} {{ tools[0].function.parameters.required | join }}
{% for tool in tools if tool.function.name == 'noop' %}{{ tool.function.name }}{{ tool.function.parameters is mapping and not tool.function.parameters }}{% endfor %}
{% for name, p in tools[0].function.parameters.properties.items() %}{{ name }}: {{ p.type | upper }}{{ '?' if name not in tools[0].function.parameters.required }}{% if p.enum %} {{ p.enum | map('tojson') | join(' | ') }}{% endif %}{{ ',' if not loop.last }}{% endfor %}
{% macro ty(s) %}{% if s.type == 'object' %}{ {% for k, v in s.properties.items() %}{{ k }}: {{ ty(v) }}{{ '; ' if not loop.last }}{% endfor %} }{% elif s.type is iterable and s.type is not string %}{{ s.type | join(' | ') }}{% else %}{{ s.type }}{% endif %}{% endmacro %}{{ ty(tools[0].function.parameters) }} {{ ty({'type': ['a', 'b']}) }}
{{ '%.2f' | format(2.5) }} {{ 'a' if false else 'b' ~ 'c' }} {{ ('a' if false else 'b') ~ 'c' }} {{ (messages | length) > 3 }} {{ messages | length > 3 and true }} {{ 4 is divisibleby(2) }}
{{ [{'type': 'text', 'text': 'x'}, {'type': 'image'}] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') }} {{ messages | tojson | length > 100 }}
{{ 'a\nb\n'.strip().split('\n')[-1] }} {{ 'x yz'[2:].strip() }} {{ 'abc'.rstrip('c').endswith('b') }} {{ ' a'.strip() == 'a' }} {{ "\u003ct\u003e" }} {{ 'a\\nb' }}
{% set content = 'hello' %}{% if content %}{% set content = content ~ '!' %}{% endif %}{{ content }} {% set x %}  {{ content }}  {% endset %}[{{ x | trim }}] {% set t = tools if tools is defined else none %}{{ t | length }}
{% macro a() %}{{ bos_token }}{% endmacro %}{% macro b(x) %}{{ a() }}{{ x }}{% endmacro %}{{ b('!') }} {% macro c(m) %}{% for x in m %}{{ x.role[0] }}{% endfor %}{% endmacro %}{{ c(messages) }} {% macro e() %}{% endmacro %}[{{ e() }}]
{{ 'they\'re John\'s 3rd o2o élan'.title() }} {{ 'ONE two_three'.title() }} {{ 'a-b c'.title() }} {{ ''.title() }}
{{ data.people | sort(attribute='name', reverse=true) | map(attribute='name') | first }} {{ data.dict | dictsort(reverse=true) | first }} {{ ['B', 'a'] | sort(case_sensitive=true) }} {{ {'b': 1, 'a': 2} | dictsort(by='value') }}
{{ 'x' | default('y', true) }} {{ data.nope.nope is defined if data.nope is defined else 'guarded' }} {{ (data.nope or {}).nope is defined }} {{ data.empty | default([1], true) }} {{ 0 | default(7, boolean=True) }} {{ nope | default }}|
{{ '12.7' | int }} {{ ' 42 ' | int }} {{ '1e3' | int }} {{ none | int }} {{ none | int(default=3) }} {{ '0x1A' | int(base=16) }} {{ true | int }} {{ 'z' | float(1.5) }} {{ [] | float }} {{ '-3' | int }} {{ '1_000' | int }}
{{ 'hello world foo bar baz' | truncate(11) }} {{ 'hello world foo bar baz' | truncate(11, true) }} {{ 'hello world foo' | truncate(9, end='..', leeway=0) }} {{ "it's one-two 3" | wordcount }} {{ 'abc' | center(7) }}| {{ 'abc'.center(8, '*') }} {{ 'abc' | center(2) }}
{{ '\n'.join(messages | map(attribute='role')) }} {{ ''.join(['x', 'y']) }} {{ ', '.join(data.dict.keys()) }} {{ 'a'.join('xyz') }}
""".strip("\n").split("\n{")
SNIPPETS = [SNIPPETS[0]] + ["{" + snippet for snippet in SNIPPETS[1:]] + [
    "{% if true %}\nline\n{% endif %}\n   {% if true %}   indented\n\t{% endif %}   tail\n\n",
    "  {# a comment #}\n  x\n{#- trimmed -#}\n\n  y  {{ 1 }}\n\n",
    "{%- for i in range(2) %}\n    {{- i }}\n{% endfor -%}\n\n end\n",
    "{% if true -%}\r\n  crlf\r\n{%- endif %}\r\ntail\r\n",
    "{{ 'x\\n' }} {{ 'a\nb' }} {{ \"a'b\" }} {{ 'a\\'b' }}",
    "a\n  {%+ if true %}b{% endif +%}\n  {% if true +%}\nc{% endif %}\n",
    "{% set x %}\n  body\n{% endset %}\n[{{ x }}]",
]
DATA = {
    "n": 5,
    "f": 1e22,
    "big": 123456789012345678901234567890.0,
    "e": 1.5e-9,
    "dict": {"b": 2, "a": "\u00e9", "c": [1, {"d": None}]},
    "people": [
        {"name": "Ann", "age": 31, "admin": True},
        {"name": "Bob", "age": 28, "admin": False},
        {"name": "Cy", "age": 45, "admin": True},
    ],
    "tree": [{"v": 1, "kids": [{"v": 2, "kids": []}, {"v": 3}]}, {"v": 4}],
    "empty": [],
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def render(source, messages, tools=None, add_generation_prompt=False, named=NAMED, **kwargs):
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt, **named, **kwargs
        )
        return {"text": text}
    except Exception as error:
        raised = type(error).__name__ == "TemplateError"
        return {"raised": str(error)} if raised else {"error": f"{type(error).__name__}: {error}"}


def main():
    templates = {path.stem: path.read_text() for path in sorted((HERE / "templates").glob("*.jinja"))}
    fields = GGUFReader(sys.argv[1]).fields
    templates["default-model"] = fields["tokenizer.chat_template"].contents()
    names = fields["tokenizer.ggml.tokens"].contents()
    own = {role: names[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for role, key in
           [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]}
    cases = []
    for (name, source), conversation, tools, prompt in itertools.product(
        templates.items(), CONVERSATIONS, [None, TOOLS], [False, True]
    ):
        if tools and conversation not in ("one", "tools"):
            continue
        if conversation == "parts" and name != "parts":
            continue  # transformers prints the list, or nothing; we join its texts
        messages = CONVERSATIONS[conversation]
        kwargs = {"enable_thinking": False, "date_string": "1 May 1999"} if conversation == "system" else {}
        result = render(source, messages, tools, prompt, own if name == "default-model" else NAMED, **kwargs)
        if "tool_calls" not in source and any(message["content"] is None for message in messages):
            continue  # an error, or "None", in transformers; we put an empty text there
        case = {"template": name, "conversation": conversation, "with_tools": bool(tools), "prompt": prompt}
        cases.append(case | {"kwargs": kwargs} | result)
    snippets = [
        {"source": source} | render(source, CONVERSATIONS["tools"], TOOLS, True, data=DATA) for source in SNIPPETS
    ]
    goldens = {
        "now": NOW.isoformat(),
        "named_tokens": NAMED,
        "templates": {name: source for name, source in templates.items() if name != "default-model"},
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "data": DATA,
        "cases": cases,
        "snippets": snippets,
    }
    (GOLDENS / "chat-goldens.json").write_text(json.dumps(goldens, ensure_ascii=True, indent=0) + "\n")
    print(len(cases), "cases,", len(snippets), "snippets")


if __name__ == "__main__":
    main()
