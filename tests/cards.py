"""Base cards as publishers find them: written by us, with what made those that were met hard to take in."""

# a quantization's own card: tables of HTML with styles, an address without quotes, rules that look like front matter, half of HTML's tokens
QUANTIZED = """---
base_model: river/heron-9b
library_name: transformers
license: apache-2.0
license_link: https://river.example/heron/licence
pipeline_tag: image-text-to-text
---

<div align="center">
<img src=https://river.example/heron/banner.png>
</div>

<div align="left">
<table align="center" style="border-collapse:collapse; border:none;">
<tr style="border:none;">
<td align="right" style="border:none; padding:4px 12px 4px 0;"><b>Version</b></td>
<td align="left" style="border:none; padding:4px 0;"><code>EN</code> <code>KO</code>
<a href="mailto:keeper@river.example">Keeper</a></td>
</tr>
</table>
</div>

---

<p align="center">
<a href="https://river.example" target="_blank">River</a> |
<br>
<b>License</b>: <a href="/heron/licence" target="_blank">Apache 2.0</a>
</p>

## **Herons**

| | Heron 9B | Heron 2B |
| :---- | :---- | :---- |
| **Fishing** | | |
| Patience (hours, *higher is better*) | *~4* | - |

<details>
<summary>How a heron thinks</summary>

Thoughts stand between <|channel>thought and <channel|>, as in `<|channel>thought\n` and what comes behind it.

</details>

```python
prompt = "{{ bird }} <bos> {% if wet %}" + "<script>"
```

### **What a heron is for**

Standing still, and of all the birds of the river it is the one that does so best.
"""

# indents were lost on the way: front matter is no YAML any more, lists are flat; a note, definitions of links far below
UNINDENTED = """---
license: heron
library_name: transformers
extra_gated_heading: Wade in
extra_gated_prompt: To wade in, you’re asked to take off your shoes and
to leave them on the bank. Nobody takes them away.
extra_gated_button_content: Take off
tags:
- wading
- fishing
---

> [!Note]
> This is the heron as it was hatched.
>
>  * It has [two sizes][sizes], of which one lies within the other.

# Heron

-   **Input:**
-   Fish, of up to a
pound each

| Benchmark            | n-shot  | 2B   | 9B   |
| -------------------- |---------|:----:|:----:|
| [WadeBench][wade]    | 10-shot | 72.1 | 78.9 |

[wade]: https://river.example/wade
[sizes]: https://river.example/sizes#two

```python
output = pipe(
"bee.jpg",
text="<image_soft_token> in this water, there is"
)
```

Text with <image_soft_token> beside it, which is no tag of HTML.

Compared with other birds that stand as still as this one does, it has
shown to be the better alternative.
"""

# no front matter, another script, rows with too few cells, code without fences
CHINESE = """苍鹭 |
文档
许可证: Apache 2.0 | 作者: 河边
苍鹭是一种会等待的鸟,它可以在水里站很久。

| 属性 | 小 | 大 |
|---|---|---|
| 身高 | 40 厘米 | 100 厘米 |
| 视觉 | |||

from heron import Heron
heron = Heron.from_nest(
nest="auto"
)完成后即可开始:
思考内容写在 <|channel>thought 与 <channel|> 之间。
它知道:等待比追赶更好。
"""

# a page as a browser copies it: blank lines, symbols, underlined words, a fence that nobody closes
CAPTURE = """


Base model river/heron-9b this model Adapters 6 models ✓ Finetunes ..... 35 models Quantizations 57 models ▼ 🌍 🕽

**Collections including** river/heron-9b

264 items • Updated 2 days ago • △ 129

∠ Edit model card

## Heron model card

Terms of Use: <u>Terms</u>

# O Description

```
$ pip install -U heron
```

```
heron.wait(hours=4)

Copied to the end, and the fence above stays open

Docs
"""

MET = {"a quantization's own": QUANTIZED, "lost indents": UNINDENTED, "Chinese": CHINESE, "a page's capture": CAPTURE}
