"""Questions with short answers about scenes and digits, in four languages.

An answer is one word or a short noun phrase in lower case, so that a model's answer counts as
right when it equals it. Yes/no questions come in pairs that differ only in the answer.
"""

import functools

from internvl_jax.data import scenes, text

YES_NO = {"en": ("yes", "no"), "zh": ("是", "否"), "ko": ("예", "아니요"), "es": ("sí", "no")}
_ASK = {
    "en": {
        "color": "what color is the object?",
        "shape": "what shape is the object?",
        "count": "how many objects are there?",
        "is_there": "is there {a}?",
        "color_of": "what color is {shape}?",
        "shape_of": "what shape is the {color} object?",
        "left": "what is on the left?",
        "right": "what is on the right?",
        "above": "what is at the top?",
        "below": "what is at the bottom?",
        "is_left": "is {a} to the left of {b}?",
        "is_above": "is {a} above {b}?",
        "digit": "which digit is this?",
        "is_digit": "is this the digit {n}?",
    },
    "zh": {
        "color": "物体是什么颜色?",
        "shape": "物体是什么形状?",
        "count": "图中有几个物体?",
        "is_there": "图中有{a}吗?",
        "color_of": "{shape}是什么颜色?",
        "shape_of": "{color}的物体是什么形状?",
        "left": "左边是什么?",
        "right": "右边是什么?",
        "above": "上面是什么?",
        "below": "下面是什么?",
        "is_left": "{a}在{b}的左边吗?",
        "is_above": "{a}在{b}的上面吗?",
        "digit": "这是什么数字?",
        "is_digit": "这是数字{n}吗?",
    },
    "ko": {
        "color": "물체는 무슨 색인가?",
        "shape": "물체는 무슨 모양인가?",
        "count": "물체는 몇 개인가?",
        "is_there": "그림에 {a:이} 있는가?",
        "color_of": "{shape:은} 무슨 색인가?",
        "shape_of": "{color} 물체는 무슨 모양인가?",
        "left": "왼쪽에 무엇이 있는가?",
        "right": "오른쪽에 무엇이 있는가?",
        "above": "위에 무엇이 있는가?",
        "below": "아래에 무엇이 있는가?",
        "is_left": "{a:은} {b} 왼쪽에 있는가?",
        "is_above": "{a:은} {b} 위에 있는가?",
        "digit": "이것은 무슨 숫자인가?",
        "is_digit": "이것은 숫자 {n}인가?",
    },
    "es": {
        "color": "¿de qué color es el objeto?",
        "shape": "¿qué forma tiene el objeto?",
        "count": "¿cuántos objetos hay?",
        "is_there": "¿hay {a}?",
        "color_of": "¿de qué color es {shape}?",
        "shape_of": "¿qué forma tiene el objeto {color}?",
        "left": "¿qué hay a la izquierda?",
        "right": "¿qué hay a la derecha?",
        "above": "¿qué hay arriba?",
        "below": "¿qué hay abajo?",
        "is_left": "¿está {a} a la izquierda {of_b}?",
        "is_above": "¿está {a} encima {of_b}?",
        "digit": "¿qué número es este?",
        "is_digit": "¿es este el número {n}?",
    },
}
_COUNTS = {"en": ("one", "two"), "zh": ("一个", "两个"), "ko": ("한 개", "두 개")}
_COUNTS["es"] = ("uno", "dos")


@functools.cache
def about_scene(description: tuple, language: str) -> tuple[tuple[str, str], ...]:
    """All (question, answer) pairs of a scene description (`Scene.description`).

    A question that the picture does not settle is left out: the colour of "the star" is asked
    only where there is one star.
    """
    objects, relation = description
    ask = _ASK[language]
    phrases = [text.Phrase(text.noun(*item, language)) for item in objects]
    pairs = [(ask["count"], _COUNTS[language][len(objects) - 1])]
    yes, no = YES_NO[language]
    pairs += [(ask["is_there"].format(a=phrases[0]), yes)]
    pairs += [(ask["is_there"].format(a=_absent(description, language)), no)]
    if relation is None:
        color, shape, _ = objects[0]
        pairs.append((ask["color"], text.COLOR_NAMES[language][color]))
        pairs.append((ask["shape"], text.SHAPES[language][shape]))
        return tuple(pairs)
    places = ("left", "right") if relation == "left" else ("above", "below")
    for place, item in zip(places, objects, strict=True):
        pairs.append((ask[place], text.noun(*item[:2], None, language, article=False)))
    for (color, shape, _), (other_color, other_shape, _) in (objects, objects[::-1]):
        if shape != other_shape:
            noun = text.Phrase(text.definite(None, shape, language))
            question = ask["color_of"].format(shape=noun)
            pairs.append((question, text.COLOR_NAMES[language][color]))
        if color != other_color:
            tint = text.COLORS[language][color]
            question = ask["shape_of"].format(color=tint[0] if language == "es" else tint)
            pairs.append((question, text.SHAPES[language][shape]))
    known = [text.Phrase(text.definite(*item[:2], language)) for item in objects]
    for first, second, answer in ((*known, yes), (*known[::-1], no)):
        # Spanish joins "de el" to "del"; the other languages do not use this field.
        of_second = f"de {second}".replace("de el ", "del ")
        question = ask[f"is_{relation}"].format(a=first, b=second, of_b=of_second)
        pairs.append((question, answer))
    return tuple(pairs)


@functools.cache
def about_digit(digit: int, language: str) -> tuple[tuple[str, str], ...]:
    """All (question, answer) pairs of a handwritten digit."""
    ask, (yes, no) = _ASK[language], YES_NO[language]
    names = text.DIGITS[language]
    return (
        (ask["digit"], names[digit]),
        (ask["is_digit"].format(n=names[digit]), yes),
        (ask["is_digit"].format(n=names[(digit + 1 + digit % 3) % 10]), no),
    )


def _absent(description, language):
    """A phrase for an object that is near to one in the scene but not there.

    Size apart, it shares the shape with the first object in half of the scenes and the colour in
    the other half, so that the answer hangs on both.
    """
    objects, _ = description
    color, shape, size = objects[0]
    present = {item[:2] for item in objects}
    turn = scenes.COLORS.index(color) + scenes.SHAPES.index(shape) + len(objects)
    for step in range(1, 8):
        if turn % 2:
            pair = (scenes.COLORS[(scenes.COLORS.index(color) + step) % 8], shape)
        else:
            pair = (color, scenes.SHAPES[(scenes.SHAPES.index(shape) + step) % 6])
        if pair not in present and pair not in scenes.HELD_OUT_PAIRS:
            return text.Phrase(text.noun(*pair, size, language))
    raise AssertionError("every colour and every shape has four partners in training")
