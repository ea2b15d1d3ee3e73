-- The same for the new application, on the second shape (pgbench).
\set client random_zipfian(1, :customers, 1.1)
\set purchase random(1, :orders)
\set what random(1, 100)
\set cents random(100, 9999)
\if :what <= 50
SELECT full_name, balance, labels FROM public.client WHERE client_id = :client;
SELECT position, article, amount, unit_price FROM public.item WHERE purchase_id = :purchase ORDER BY position;
\elif :what <= 70
BEGIN;
INSERT INTO public.purchase (client_id, state, placed_at, street, city) VALUES (:client, 'new', now(), 'Rue 7', 'Liège') RETURNING purchase_id \gset
INSERT INTO public.item (purchase_id, position, article, amount, unit_price, discount_percent) VALUES (:purchase_id, 1, 'SKU-é', 3, :cents / 100.0, 12.5);
UPDATE public.client SET balance = balance - 3 * :cents / 100.0 WHERE client_id = :client;
COMMIT;
\elif :what <= 85
UPDATE public.purchase SET state = 'shipped', city = 'Gent, Oost-Vlaanderen' WHERE purchase_id = :purchase;
\elif :what <= 95
UPDATE public.client SET full_name = 'Zoë ' || :cents, settings = '{"theme": "dark"}' WHERE client_id = :client;
\else
DELETE FROM public.item WHERE purchase_id = :purchase AND position = 3;
\endif
