# Objects, dictionaries, strings and big numbers in the Python interpreter.
class Node:
    def __init__(self, value):
        self.value, self.left, self.right = value, None, None

    def add(self, value):
        node = self
        while True:
            side = "left" if value < node.value else "right"
            below = getattr(node, side)
            if below is None:
                setattr(node, side, Node(value))
                return
            node = below


def walk(node):
    if node:
        yield from walk(node.left)
        yield node.value
        yield from walk(node.right)


x, root, counts = 1, Node(1 << 30), {}
for _ in range(6000):
    x = (x * 1103515245 + 12345) % (1 << 31)
    root.add(x)
    key = "k%d" % (x % 500)
    counts[key] = counts.get(key, 0) + 1
print(sum(i * v for i, v in enumerate(walk(root))) % 1000003)
print(sorted(counts.items())[:5])
print(str(3**4000)[:50], len("".join(reversed(str(2**9000)))))
print(sum(1 for n in range(2, 6000) if all(n % d for d in range(2, int(n**0.5) + 1))))
